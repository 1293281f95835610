"""Damages of JSON documents by structure: at each place a value of every other kind, a missing key, one too many."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Place = tuple[str | int, ...]


def nested(depth: int) -> Any:
    """Lists in lists."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


HUGE = 10**400
KINDS: dict[str, Any] = {
    "null": None,
    "text": "x",
    "empty text": "",
    "half a surrogate pair": "\ud800",
    "true": True,
    "negative": -1,
    "zero": 0,
    "one": 1,
    "fraction": 0.5,
    "large": 2**40,
    "beyond 64 bits": 2**70,
    "beyond floats": HUGE,
    "infinity": float("inf"),
    "NaN": float("nan"),
    "list": ["x"],
    "empty list": [],
    "object": {"x": 1},
    "empty object": {},
    "nested": nested(200),
}
"""A value of each wrong kind, and of each wrong size. Infinity is what 1e400 is read as."""


@dataclass(frozen=True)
class Damage:
    """One change of a document."""

    place: Place
    what: str
    """A name of `KINDS`, or what else was done."""
    document: Any

    def __str__(self) -> str:
        return f"{'.'.join(map(str, self.place)) or 'the document'}: {self.what}"


def kind_of(value: Any) -> str:
    """The kind of a JSON value: a number that no reader may take, and half a surrogate pair, are kinds of their own."""
    if isinstance(value, bool) or value is None:
        return str(value is None or type(value))
    if isinstance(value, int):
        return "number" if abs(value) < 1 << 64 else "no number"
    if isinstance(value, float):
        return "number" if math.isfinite(value) else "no number"
    if isinstance(value, str):
        return "half a pair" if "\ud800" in value else "text"
    return type(value).__name__


def places(value: Any, place: Place = ()) -> Iterator[Place]:
    """Every place of a document; of a list the first two values and the last."""
    yield place
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, (*place, key))
    elif isinstance(value, list):
        for index in sorted({*range(min(2, len(value))), len(value) - 1} - {-1}):
            yield from places(value[index], (*place, index))


def damages(document: Any, *, at: Sequence[Place] | None = None) -> Iterator[Damage]:
    """Every damage at these places, or at all places of the document."""
    for place in places(document) if at is None else at:
        for name, value in KINDS.items():
            yield Damage(place, name, changed(document, place, value))
        found = value_at(document, place)
        if isinstance(found, dict):
            yield Damage(place, "one key more", changed(document, place, {**found, "one more": 1}))
            for key in found:
                rest = {k: v for k, v in found.items() if k != key}
                yield Damage((*place, key), "missing", changed(document, place, rest))
        elif isinstance(found, list) and found:
            yield Damage(place, "cut short", changed(document, place, found[:-1]))
            yield Damage(place, "longer", changed(document, place, [*found, found[-1]]))


def value_at(document: Any, place: Place) -> Any:
    for key in place:
        document = document[key]
    return document


def changed(document: Any, place: Place, value: Any) -> Any:
    """A copy of the document with another value at a place."""
    if not place:
        return value
    result = copy.copy(document)
    result[place[0]] = changed(document[place[0]], place[1:], value)
    return result
