"""A program as JSON. Fields with default values are left out, since a cold start parses hundreds of operators.

A program is a frozen dataclass of the backend: tuples of dataclasses, strings and integers. An operator is a dataclass
whose fields are buffer views, numbers and strings; all but the first ones have defaults. Imports nothing from Transom.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cache
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class View:
    """Columns of a buffer, from `offset` on."""

    buffer: int
    offset: int = 0


NOWHERE = View(-1)


@dataclass(frozen=True)
class RopeTable:
    """`count` float32 frequencies at offset `at` of the weights; cosines and sines are multiplied by `factor`."""

    at: int
    count: int
    factor: float


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer; `sinks` is an offset in the weights, or -1."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    window: int
    scale: float
    softcap: float
    sinks: int

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads


def to_json(program: Any) -> str:
    """A program as JSON."""
    raw = asdict(program)
    raw["ops"] = [lean(op) for op in program.ops]
    return json.dumps(raw, separators=(",", ":"))


def from_json(kind: type[T], text: str, parts: Mapping[str, Callable[[Any], Any]]) -> T:
    """Parse the output of `to_json` into a program of class `kind`.

    Args:
        parts: parses one member of a tuple field, by field name.

    Raises:
        ValueError, KeyError, TypeError: the text is not such a program.
    """
    raw: dict[str, Any] = json.loads(text)
    own: Any = kind
    known: dict[str, Any] = {}
    for field in fields(own):
        value = raw[field.name]
        if part := parts.get(field.name):
            known[field.name] = tuple(part(member) for member in value)
        else:
            known[field.name] = int(value) if field.type in ("int", int) else str(value)
    return kind(**known)


def lean(op: Any) -> dict[str, Any]:
    """An operator as JSON types, without fields that have their default value."""
    found: dict[str, Any] = {}
    for field in fields(op):
        value = getattr(op, field.name)
        if field.default is MISSING or value != field.default:
            found[field.name] = [value.buffer, value.offset] if isinstance(value, View) else value
    return found


def operator(kind: type[T], raw: Mapping[str, Any]) -> T:
    """Parse the output of `lean` into an operator of class `kind`. Raises TypeError if it does not fit."""
    own: Any = kind
    views = _views(own)
    return kind(**{name: View(*value) if name in views else value for name, value in raw.items()})


@cache
def _views(kind: Any) -> frozenset[str]:
    """Names of the fields that are views."""
    return frozenset(field.name for field in fields(kind) if isinstance(field.default, View))
