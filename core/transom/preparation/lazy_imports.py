"""Defers the import of modules that take long to import and are seldom needed until an attribute is used."""

from __future__ import annotations

import importlib
import sys
import threading
import types
from typing import Any

_LOCK = threading.RLock()


class _LazyModule(types.ModuleType):
    """Stands in for a module until one of its attributes is used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import system looks these up
            raise AttributeError(name)
        with _LOCK:
            if sys.modules.get(self.__name__) is self:
                del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


def import_later(*names: str) -> None:
    """Defer the import of these modules until an attribute is used. Modules that are imported already stay loaded."""
    for name in names:
        sys.modules.setdefault(name, _LazyModule(name))
