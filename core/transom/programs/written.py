"""A program as JSON. Fields with default values are left out, since a cold start parses hundreds of operators.

A program is a frozen dataclass of the backend: tuples of dataclasses, strings and integers. An operator is a dataclass
whose fields are buffer views, numbers and strings; all but the first ones have defaults. Imports nothing from Transom.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cache
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

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
    raw["ops"] = [_lean(op) for op in program.ops]
    return json.dumps(raw, separators=(",", ":"))


def from_json(kind: type[T], text: str) -> T:
    """Parse the output of `to_json` into a program of class `kind`.

    Its fields are annotated as `int`, `str`, or tuples of integers or dataclasses, as in `tuple[RopeTable, ...]`.

    Raises:
        ValueError, KeyError, TypeError: the text is not such a program.
    """
    raw: dict[str, Any] = json.loads(text)
    known: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        if get_origin(hint) is tuple:
            member = get_args(hint)[0]
            known[name] = tuple(int(value) if member is int else _record(member, value) for value in raw[name])
        else:
            known[name] = hint(raw[name])
    return kind(**known)


def _lean(op: Any) -> dict[str, Any]:
    """An operator as JSON types, without fields that have their default value."""
    found: dict[str, Any] = {}
    for field in fields(op):
        value = getattr(op, field.name)
        if field.default is MISSING or value != field.default:
            found[field.name] = [value.buffer, value.offset] if isinstance(value, View) else value
    return found


def _record(kind: Any, raw: Any) -> Any:
    """A dataclass from its fields, which may be the output of `_lean`. Raises TypeError if they do not fit."""
    if not isinstance(raw, dict):
        raise TypeError(f"{kind.__name__} is not an object")
    views = _views(kind)
    return kind(**{name: View(*value) if name in views else value for name, value in raw.items()})


@cache
def _views(kind: Any) -> frozenset[str]:
    """Names of the fields that are views."""
    return frozenset(field.name for field in fields(kind) if isinstance(field.default, View))
