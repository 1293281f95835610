"""Reads JSON as the type that its reader expects: `typed(dict[str, float], value)`.

What lies in a cache, in a bundle or beside a model may be damaged or forged. A document is therefore read as a type
once, where it comes in, so that no reader meets a text where it expects a number. A value is never converted: "1" and
true are no integers. Imports no other module of Transom and no third-party package.
"""

from __future__ import annotations

import functools
import json
import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import (
    Any,
    Literal,
    NotRequired,
    Required,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

T = TypeVar("T")

_LARGEST = 1 << 64
"""Every integer is smaller: sizes, times in nanoseconds and inodes are. No float holds 10**400."""


class WrongType(ValueError):
    """A JSON value is not of the expected type.

    Args:
        place: where it is in its document, `"layers.0.heads"`; empty for the whole document.
        found: what is there instead, for a sentence: a value, or `"missing"`.
        wanted: the expected type: `"a text"`; may be empty.
    """

    def __init__(self, place: str, found: str, wanted: str = "") -> None:
        super().__init__(place, found, wanted)
        self.place, self.found, self.wanted = place, found, wanted

    def __str__(self) -> str:
        return self.sentence("it")

    def sentence(self, document: str) -> str:
        """What is wrong, without a full stop.

        Args:
            document: its name: `"special_tokens_map.json"`.
        """
        subject = document if not self.place else self.place if document == "it" else f"{self.place} in {document}"
        return f"{subject} is {self.found}" + (f", not {self.wanted}" if self.wanted else "")


def from_json(kind: type[T], text: str | bytes) -> T:
    """The value of a JSON document. Raises WrongType, also for what is not JSON."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # a UnicodeDecodeError is a ValueError
        raise WrongType("", f"not JSON: {error}") from error
    return typed(kind, value)


def typed(kind: type[T], value: object, place: str = "") -> T:
    """A value that `json.loads` returned, as a type.

    Args:
        kind: `str`, `bool`, `int` (of 64 bits), `float` (finite; an integer is one), `None`, `object` for any value,
            unions and literals; `list[X]`, `tuple[X, ...]` and `tuple[X, Y]`, `dict[str, X]`; a TypedDict, a NamedTuple
            or a dataclass, whose keys must be all there unless they have a default or are `NotRequired`. Only a
            TypedDict with `total=False` may have other keys, which are left as they are; its own may all be missing
            but the `Required` ones.
        place: of the value in its document, for the message.

    Raises:
        WrongType: the value is of another type, or lies deeper than Python's stack.
    """
    try:
        found: T = _typed(kind, value, place)
    except RecursionError:
        raise WrongType(place, "nested too deep") from None
    return found


def _typed(kind: Any, value: Any, place: str) -> Any:
    if kind is object or kind is Any:
        return value
    if kind is None or kind is type(None):
        return value if value is None else _fail(value, place, "null")
    if kind is bool:
        return value if isinstance(value, bool) else _fail(value, place, "true or false")
    if kind is int:
        return value if type(value) is int and abs(value) < _LARGEST else _fail(value, place, "a whole number")
    if kind is float:
        finite = math.isfinite(value) if type(value) is float else type(value) is int and abs(value) < _LARGEST
        return float(value) if finite else _fail(value, place, "a finite number")
    if kind is str:
        return value if isinstance(value, str) and _encodes(value) else _fail(value, place, "a text")
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _union(args, value, place)
    if origin is Literal:
        return value if any(type(value) is type(a) and value == a for a in args) else _fail(value, place, str(args))
    if origin is list or origin is tuple:
        return _list(origin, args, value, place)
    if origin in (dict, Mapping):
        if not isinstance(value, dict):
            _fail(value, place, "an object")
        return {_typed(str, key, place): _typed(args[1], item, _inside(place, key)) for key, item in value.items()}
    return _record(kind, value, place)


def _union(kinds: tuple[Any, ...], value: Any, place: str) -> Any:
    errors = []
    for kind in kinds:
        try:
            return _typed(kind, value, place)
        except WrongType as error:
            errors.append(error)
    deepest = max(errors, key=lambda error: len(error.place))  # it is of the kind, but for this
    if deepest.place == place:
        _fail(value, place, " or ".join(error.wanted for error in errors))
    raise deepest


def _list(origin: Any, args: tuple[Any, ...], value: Any, place: str) -> Any:
    if not isinstance(value, list):
        _fail(value, place, "a list")
    if origin is tuple and args[-1] is not Ellipsis:
        if len(value) != len(args):
            _fail(value, place, f"a list of {len(args)}")
        members = args
    else:
        members = (args[0],) * len(value)
    pairs = enumerate(zip(members, value, strict=True))
    return origin([_typed(kind, item, _inside(place, index)) for index, (kind, item) in pairs])


def _record(kind: Any, value: Any, place: str) -> Any:
    if not isinstance(value, dict):
        _fail(value, place, "an object")
    hints, optional, open_ = _fields(kind)
    for key in hints:
        if key not in value and key not in optional:
            raise WrongType(_inside(place, key), "missing")
    if not open_:
        for key in value:
            if key not in hints:
                raise WrongType(_inside(place, key), "not known")
    found = {key: _typed(hints[key], item, _inside(place, key)) for key, item in value.items() if key in hints}
    return {**value, **found} if is_typeddict(kind) else kind(**found)


@functools.cache
def _fields(kind: Any) -> tuple[dict[str, Any], frozenset[str], bool]:
    """Types of a record's fields, the optional ones, and whether it may have others."""
    if is_typeddict(kind):
        # Not `__optional_keys__`, which counts every key of a module with postponed annotations as required.
        marked = get_type_hints(kind, include_extras=True)
        left_out = NotRequired if kind.__total__ else Required
        optional = {key for key, hint in marked.items() if (get_origin(hint) is left_out) == kind.__total__}
        return get_type_hints(kind), frozenset(optional), not kind.__total__
    hints = get_type_hints(kind)
    if is_dataclass(kind):
        given = [f for f in fields(kind) if f.init]
        defaults = {f.name for f in given if f.default is not MISSING or f.default_factory is not MISSING}
        return {f.name: hints[f.name] for f in given}, frozenset(defaults), False
    return hints, frozenset(kind._field_defaults), False


def _encodes(text: str) -> bool:
    """Whether a text can be printed and be part of a path: JSON may state half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _inside(place: str, key: object) -> str:
    return f"{place}.{key}" if place else str(key)


def _fail(value: object, place: str, wanted: str) -> Any:
    text = repr(value) if not isinstance(value, int) or abs(value) < _LARGEST else "a huge number"
    raise WrongType(place, text if len(text) <= 80 else text[:79] + "…", wanted)
