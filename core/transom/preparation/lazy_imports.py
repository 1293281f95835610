"""Modules that are imported when something of them is used. For what takes long to import and is seldom needed."""

from __future__ import annotations

import importlib
import sys
import threading
import types
from typing import Any

_LOCK = threading.RLock()


class _Later(types.ModuleType):
    """Stands in for a module until an attribute of it is asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import system's own questions
            raise AttributeError(name)
        with _LOCK:
            if sys.modules.get(self.__name__) is self:
                del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


def import_later(*names: str) -> None:
    """From here on, an import of one of these modules costs nothing until something of it is used. Those that are
    imported already stay as they are."""
    for name in names:
        sys.modules.setdefault(name, _Later(name))
