"""What a chat template may spend: a budget of units for one rendering, and the price of each operation.

A template can ask for more than it is long: a doubled list, a repeated text, a power. So every operation whose time or
memory can exceed a constant has a price, paid before the operation runs, and a template that cannot pay is stopped.
A unit is a few nanoseconds of work and at most a byte of memory; copied text has a limit of its own in bytes. What has
no price here is not offered to templates.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from operator import length_hint
from types import MappingProxyType
from typing import Any

from jinja2.exceptions import TemplateRuntimeError
from jinja2.runtime import LoopContext
from jinja2.utils import Cycler, Joiner, Namespace
from markupsafe import Markup

UNITS = 1 << 26
"""The budget of one rendering, far above the needs of real templates and conversations: well below a second."""
BYTES = 1 << 29
"""Text that one rendering may copy. Some templates append to a text for each message, so it is more than they keep."""
CALL = 128
"""The price of a call, in units."""
ITEM = 16
"""The price of an item of a list that is read or made, in units."""
MAX_DEPTH = 400
"""Lists in lists: below the depth at which Python's own C functions overflow their stack."""
MAX_BITS = 1 << 12
"""Size of a whole number: beyond it, some operations take more than linear time."""
MAX_KEYS = 1 << 8
"""Keys of a mapping that are no texts. Python's hashes of numbers and of tuples are no secret, so a template can choose
keys that collide, and each look-up then compares with all of them. The hashes of texts differ in each process."""

_CLOCK = UNITS >> 6
_SCALARS = frozenset({bool, int, float, type(None)})
_DIGITS = re.compile(r"\d+")
_SPACES = "\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)
_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
_VIEWS: tuple[Any, ...] = (type({}.keys()), type({}.values()), type({}.items()))
_BESIDE = "é".__sizeof__() - 2  # bytes of a text besides its characters and the one that ends them
_SIZED = (str, list, tuple, Mapping, range, *_VIEWS)


class TemplateLimit(TemplateRuntimeError):
    """The template ran too long or made something too large."""


class _Budget:
    """The units that are left, and the time at which rendering ends in any case."""

    __slots__ = ("_check", "_deadline", "bytes", "left")

    def __init__(self, seconds: float) -> None:
        self.left = UNITS
        self.bytes = BYTES
        self._check = UNITS - _CLOCK
        self._deadline = time.monotonic() + seconds

    def spend(self, units: int) -> None:
        self.left -= units
        if self.left < self._check:
            if self.left < 0:
                raise TemplateLimit("it takes too many steps or makes too much text")
            if time.monotonic() > self._deadline:
                raise TemplateLimit("it runs too long")
            self._check = self.left - _CLOCK


_budget: ContextVar[_Budget] = ContextVar("transom_template_budget")


@contextmanager
def limits(seconds: float) -> Iterator[None]:
    """Context for compiling and rendering: what exceeds the units or the seconds raises `TemplateLimit`."""
    token = _budget.set(_Budget(seconds))
    try:
        yield
    finally:
        _budget.reset(token)


def spend(units: int) -> None:
    """Pay for an operation.

    Raises:
        TemplateLimit: the budget does not suffice, or the time is over.
    """
    _budget.get().spend(units)


def make(size: int) -> None:
    """Pay for a copy of text of this many bytes.

    Raises:
        TemplateLimit: the budget does not suffice, or the time is over.
    """
    budget = _budget.get()
    budget.bytes -= size
    if budget.bytes < 0:
        raise TemplateLimit("it makes too much text")
    budget.spend(size >> 3)


# ------------------------------------------------------------------- sizes


def size(text: str) -> int:
    """Bytes of a text in memory."""
    return len(text) if text.isascii() else text.__sizeof__()


def together(texts: Sequence[str]) -> int:
    """Bytes of the text that several make: all its characters are as wide as the widest of them."""
    return sum(map(len, texts)) * (1 if all(map(str.isascii, texts)) else max(map(_wide, texts)))


def _wide(text: str) -> int:
    """Bytes of a character. Too many where Python keeps the UTF-8 of a text beside it, but at most four."""
    return 1 if text.isascii() else min(4, (text.__sizeof__() - _BESIDE) // (len(text) + 1))


def weight(value: Any) -> int:
    """The size of a value with everything inside it, as often as it occurs: what printing it costs.

    Raises:
        TemplateLimit: it is larger than the budget, or nested too deep. Lists that contain a list twice are small in
            memory and can be of any weight.
    """
    kind = type(value)
    if kind is str:
        return size(value)
    if kind is int:
        return ITEM + int(value.bit_length() >> 3)
    if kind in _SCALARS:
        return ITEM
    nodes, text, _ = measure(value)
    return nodes * ITEM + text


def read(value: Any) -> None:
    """Pay for reading a value with everything inside it."""
    spend(weight(value))


def items(value: Any) -> Any:
    """What can be read twice and measured: a list in place of an iterator, else the value itself."""
    if isinstance(value, _SIZED) or not hasattr(value, "__iter__"):
        return value
    found = []
    for item in value:
        spend(ITEM)
        found.append(item)
    return found


def count(value: Any) -> int:
    """Number of items, or of those that are left."""
    return length_hint(value, 0) if hasattr(value, "__iter__") else 0


def measure(value: Any) -> tuple[int, int, int]:
    """How many values are inside a value, the bytes of their texts, and the depth. Paid while counted.

    A container counts as four values.
    """
    budget = _budget.get()
    nodes = text = deepest = paid = 0
    levels: list[Iterator[Any]] = [iter((value,))]
    while levels:
        for item in levels[-1]:
            nodes += 1
            if nodes - paid > 255:
                budget.spend((nodes - paid) * ITEM)
                paid = nodes
                if text > budget.left:
                    budget.spend(text)
            kind = type(item)
            if kind is str:
                text += size(item)
            elif kind is int:
                text += item.bit_length() >> 3
            elif kind not in _SCALARS:
                inside = _inside(item)
                if inside is not None:
                    nodes += 3  # entering and leaving it takes longer
                    levels.append(inside)
                    break
                if isinstance(item, str):
                    text += 8 * size(item)
        else:
            levels.pop()
        deepest = max(deepest, len(levels))
        if deepest > MAX_DEPTH:
            raise TemplateLimit("it nests lists too deep")
    return nodes, text, deepest


def _inside(value: Any) -> Iterator[Any] | None:
    if isinstance(value, dict | MappingProxyType):
        return (part for pair in value.items() for part in pair)
    if isinstance(value, list | tuple | set) or type(value) in _VIEWS:
        parts: Iterator[Any] = iter(value)
        return parts
    if isinstance(value, Namespace):
        return iter((object.__getattribute__(value, "_Namespace__attrs"),))
    if isinstance(value, Cycler):
        return iter(tuple(value.items))
    if isinstance(value, LoopContext):  # a path of attributes leads to its neighbours
        return iter((value.previtem, value.nextitem))
    if isinstance(value, Joiner):
        return iter((value.sep,))
    return None


# -------------------------------------------------------------- operations


def read_key(key: Any) -> None:
    """Pay for hashing or printing what stands in brackets."""
    if type(key) is not str and type(key) not in _SCALARS:
        read(key)


def hashed(keys: Iterable[Any]) -> None:
    """Pay for a table of these keys.

    Raises:
        TemplateLimit: more than `MAX_KEYS` of them are no texts.
    """
    others: set[Any] = set()
    for key in keys:
        spend(4 * ITEM)
        if not isinstance(key, str):
            spend(weight(key) * (1 + (len(others) >> 3)))
            others.add(key)
            require_few_keys(len(others))


def require_few_keys(number: int) -> None:
    """Raises TemplateLimit: a mapping has more than `MAX_KEYS` keys that are no texts."""
    if number > MAX_KEYS:
        raise TemplateLimit(f"it makes a mapping with more than {MAX_KEYS} keys that are no texts")


def compare(operator: str, left: Any, right: Any) -> None:
    """Pay for one comparison. `operator` is Jinja's name: `eq`, `lt`, `in`, `notin`, …"""
    if operator in ("in", "notin"):
        return _contain(left, right)
    if type(left) in _SCALARS or type(right) in _SCALARS:
        return None
    if isinstance(left, str) and isinstance(right, str):
        return spend(min(len(left), len(right)) >> 2)
    nodes, text, _ = measure(left)
    others, more, _ = measure(right)
    spend(ITEM * (nodes + others) + (text + more >> 2))
    return None


def _contain(item: Any, holder: Any) -> None:
    if isinstance(holder, str):
        if isinstance(item, str):
            spend(_search(holder, item))
    elif isinstance(holder, Mapping):
        read_key(item)
    else:
        spend(ITEM * (1 + count(holder)))  # a range compares each of its numbers with what is no number
        if type(item) not in _SCALARS and not (isinstance(item, str) and len(item) < 256):
            compare("eq", item, holder)


def operate(operator: str, left: Any, right: Any) -> None:
    """Pay for a binary operation.

    Raises:
        TemplateLimit: the result would be too large.
    """
    spend(2 * ITEM)
    if isinstance(left, int) and isinstance(right, int):
        bits, more = left.bit_length(), right.bit_length()
        if bits > MAX_BITS or more > MAX_BITS or (operator == "**" and right > 0 and bits * right > MAX_BITS):
            raise TemplateLimit("it makes a number that is too large")
        return None
    if isinstance(left, int | float) and isinstance(right, int | float):
        return None
    if operator == "%" and isinstance(left, str):
        return fill(left, right)
    if operator == "+":
        if isinstance(left, str) and isinstance(right, str):
            wide = 1 if left.isascii() and right.isascii() else max(_wide(left), _wide(right))
            escaped = 1 if type(left) is type(right) is str else 8
            return make(escaped * wide * (len(left) + len(right)) + ITEM)
        if isinstance(left, list | tuple) and isinstance(right, list | tuple):
            return spend(ITEM * (len(left) + len(right)))
    if operator == "*":
        for side, times in ((left, right), (right, left)):
            if isinstance(side, str | list | tuple) and isinstance(times, int):
                if isinstance(side, str):
                    return make(size(side) * max(int(times), 0) + ITEM)
                return spend(ITEM * len(side) * max(int(times), 0))
    read(left)
    read(right)
    return None


def fill(text: str, values: Any) -> None:
    """Pay for `text % values`.

    Raises:
        TemplateLimit: a field is too wide.
    """
    if "*" in text:
        raise TemplateLimit("it asks for a field of variable width")
    if text.count("%"):
        spend(size(text) + (1 + text.count("%")) * (CALL + 8 * weight(values)) + 4 * width(text))


def width(text: str) -> int:
    """The sum of all numbers in a format, each of which may be a width.

    Raises:
        TemplateLimit: one of them is too large.
    """
    spend(4 * len(text))
    numbers = _DIGITS.findall(text)
    if any(len(number) > 5 for number in numbers):
        raise TemplateLimit("it asks for a field that is too wide")
    return sum(map(int, numbers))


def whole(value: Any, most: int = UNITS) -> int:
    """A whole number that an operation makes something from.

    Raises:
        TemplateLimit: it is too large.
    """
    if not isinstance(value, int):
        return 0
    if value > most or value < -most:
        raise TemplateLimit("it asks for something that is too large")
    return max(int(value), 0)


def _made(text: str) -> int:
    return 8 * size(text) if isinstance(text, Markup) else size(text)


def _search(text: str, part: str) -> int:
    """For a short part the worst case is a product; Python searches for a long one in linear time."""
    return len(text) * (1 + min(len(part), 100) // 8)


def _search_backwards(text: str, part: str) -> int:
    return len(text) * (1 + len(part) // 8)


def slow(text: int) -> int:
    """The price of operations that take quadratic time for some texts."""
    return text * (8 + (text >> 4))


def case(text: str) -> int:
    """The price of changing letters."""
    return 2 * len(text) if text.isascii() else 16 * len(text)


def strip(text: str, characters: Any = None) -> int:
    """The price of removing characters from both ends."""
    return size(text) * (1 + (len(characters) // 8 if isinstance(characters, str) else 0))


def replace(text: str, old: str, new: str) -> int:
    """The price of replacing one text by another."""
    found = text.count(old) if old else len(text) + 1
    return _search(text, old) + 4 * size(text) + found * (ITEM + size(new))


def join(separator: str, values: Any) -> int:
    """The price of joining texts."""
    return weight(values) + count(values) * _made(separator)


def indent(text: str, by: Any) -> int:
    """The price of indenting lines by a text or a number of spaces."""
    return 2 * size(text) + (1 + _lines(text)) * (4 * ITEM + (size(by) if isinstance(by, str) else whole(by)))


def _lines(text: str) -> int:
    return sum(map(text.count, _LINE_ENDS))


def _pieces(text: str, separator: Any) -> int:
    if isinstance(separator, str):
        return text.count(separator) if separator else 0
    return sum(map(text.count, _SPACES[:10] if text.isascii() else _SPACES))


# ----------------------------------------------------------------- methods


def call(function: Any, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Any, ...]:
    """Pay for a call of a built-in method, and return its arguments.

    Raises:
        TemplateLimit: the method has no price, or costs too much.
    """
    owner, name = function.__self__, function.__name__
    for kind, prices in _METHODS.items():
        if isinstance(owner, kind) and name in prices:
            arguments = tuple(map(items, arguments))
            values = [*arguments, *named.values()]
            prices[name](owner, values)
            return arguments
    raise TemplateLimit(f"it calls {type(owner).__name__}.{name}, which templates may not")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _padded(text: str, values: list[Any]) -> None:
    spend(size(text) + 4 * (whole(values[0]) if values else 0))


def _expanded(text: str, values: list[Any]) -> None:
    spend(size(text) + text.count("\t") * (whole(values[0]) if values else 8))


def _found(price: Callable[[str, str], int]) -> Callable[[str, list[Any]], None]:
    return lambda text, values: spend(2 * size(text) + price(text, _text(values[0]) if values else ""))


def _split(price: Callable[[str, str], int]) -> Callable[[str, list[Any]], None]:
    def pay(text: str, values: list[Any]) -> None:
        separator = next((value for value in values if isinstance(value, str)), None)
        spend(2 * size(text) + price(text, separator or "") + 6 * ITEM * (1 + _pieces(text, separator)))

    return pay


def _replaced(text: str, values: list[Any]) -> None:
    old, new = [*(_text(value) for value in values), "", ""][:2]
    spend(replace(text, old, new) * (8 if isinstance(text, Markup) else 1))


def _joined(text: str, values: list[Any]) -> None:
    spend(join(text, values[0] if values else ()) * (8 if isinstance(text, Markup) else 1))


def _reading(text: Any, values: list[Any]) -> None:
    read(text)
    read(values)


def _free(_: Any, values: list[Any]) -> None:
    for value in values:
        read_key(value)


_METHODS: dict[type, Mapping[str, Callable[[Any, list[Any]], None]]] = {
    str: {
        **dict.fromkeys(
            ("capitalize", "casefold", "lower", "swapcase", "title", "upper"), lambda text, _: spend(case(text))
        ),
        **dict.fromkeys(("center", "ljust", "rjust", "zfill"), _padded),
        "expandtabs": _expanded,
        **dict.fromkeys(("count", "find", "index", "partition"), _found(_search)),
        **dict.fromkeys(("rfind", "rindex", "rpartition"), _found(_search_backwards)),
        **dict.fromkeys(("startswith", "endswith"), lambda _, values: read(values)),
        **dict.fromkeys(("removeprefix", "removesuffix"), _reading),
        **dict.fromkeys(
            ("strip", "lstrip", "rstrip"), lambda text, values: spend(strip(text, values[0] if values else None))
        ),
        "split": _split(_search),
        "rsplit": _split(_search_backwards),
        "splitlines": lambda text, _: spend(2 * size(text) + 6 * ITEM * (1 + _lines(text))),
        "replace": _replaced,
        "join": _joined,
        **dict.fromkeys(
            (
                *("isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric"),
                *("isprintable", "isspace", "istitle", "isupper"),
            ),
            lambda text, _: spend(4 * len(text)),
        ),
    },
    list: {"copy": lambda value, _: spend(ITEM * len(value)), "count": _reading, "index": _reading},
    tuple: {"count": _reading, "index": _reading},
    dict: {
        **dict.fromkeys(("get", "items", "keys", "values"), _free),
        "copy": lambda value, _: spend(4 * ITEM * len(value)),
    },
    int: dict.fromkeys(("bit_count", "bit_length", "conjugate", "is_integer"), _free),
    float: dict.fromkeys(("conjugate", "hex", "is_integer"), _free),
    LoopContext: {},
}


def paid(values: Iterable[Any]) -> None:
    """Pay for reading several values."""
    for value in values:
        read_key(value)
