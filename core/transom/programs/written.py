"""Operators of a program as JSON, without what is as usual: a program has some hundreds, and a cold start reads all.

An operator is a frozen dataclass of the backend's whose fields are views of buffers, numbers and texts, each with a
default but for the first ones. Imports nothing of ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class View:
    """Columns of a buffer, from `offset` on."""

    buffer: int
    offset: int = 0


NOWHERE = View(-1)


def lean(op: Any) -> dict[str, Any]:
    """An operator as JSON types, without what is as usual."""
    found: dict[str, Any] = {}
    for field in fields(op):
        value = getattr(op, field.name)
        if field.default is MISSING or value != field.default:
            found[field.name] = [value.buffer, value.offset] if isinstance(value, View) else value
    return found


def operator(kind: type[T], raw: Mapping[str, Any]) -> T:
    """An operator of a class out of what `lean` gave. Raises TypeError for what is none."""
    own: Any = kind
    views = _views(own)
    return kind(**{name: View(*value) if name in views else value for name, value in raw.items()})


@cache
def _views(kind: Any) -> frozenset[str]:
    """Names of the fields that are views."""
    return frozenset(field.name for field in fields(kind) if isinstance(field.default, View))
