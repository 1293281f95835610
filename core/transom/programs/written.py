"""A program as JSON, its operators without what is as usual: it has some hundreds, and a cold start reads all.

A program is a frozen dataclass of the backend's: tuples of dataclasses, texts and whole numbers. An operator is one
whose fields are views of buffers, numbers and texts, each with a default but for the first ones. Imports nothing of
ours.
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
    """Frequencies, float32, at a place in the weights; cosines and sines are multiplied by `factor`."""

    at: int
    count: int
    factor: float


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer; `sinks` is a place in the weights, or -1."""

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
    """A program of a class out of what `to_json` gave.

    Args:
        parts: makes the members of each field that is a tuple.

    Raises:
        ValueError, KeyError, TypeError: for a text that is no such program.
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
