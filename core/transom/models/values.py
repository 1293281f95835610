"""Reads a model's settings (config.json, GGUF metadata) with checks. Errors name the setting; nothing is guessed.

An unsupported value is an error, because a model that ignores a setting generates wrong text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transom.errors import SourceError

_REQUIRED: Any = object()
LARGEST = 1 << 31
"""Upper bound of every size in a decoder's configuration."""


class Values:
    """Settings by name; `null` counts as absent.

    Args:
        data: the settings, as JSON or GGUF gives them.
        where: the file they come from, for error messages.
        prefix: prepended to each key, such as `"llama."` for GGUF.
    """

    def __init__(self, data: Mapping[str, Any], where: str, prefix: str = "") -> None:
        self.data, self.where, self.prefix = data, where, prefix

    def with_defaults(self, defaults: Mapping[str, Any]) -> Values:
        """The same settings with a family's defaults for missing keys; a key that is `null` stays absent."""
        return Values({**defaults, **self.data}, self.where, self.prefix)

    def get(self, key: str) -> Any:
        """The raw value, or None."""
        return self.data.get(self.prefix + key)

    def has(self, key: str) -> bool:
        return self.get(key) is not None

    def whole(self, key: str, default: int | None = _REQUIRED, *, low: int = 1, high: int = LARGEST) -> Any:
        """An integer in low … high. A `default` of None makes the setting optional.

        Raises:
            SourceError: the value is missing and there is no default, or it has another type or is out of range.
        """
        value = self._value(key, default)
        if value is default and not self.has(key):
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or value % 1:
            raise self.wrong(key, "a whole number")
        if not low <= value <= high:
            raise self.wrong(key, f"between {low} and {high}")
        return int(value)

    def number(
        self, key: str, default: float | None = _REQUIRED, *, low: float = -math.inf, high: float = math.inf
    ) -> Any:
        """A finite number in low … high; see `whole`."""
        value = self._value(key, default)
        if value is default and not self.has(key):
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.wrong(key, "a finite number")
        if not low <= value <= high:
            raise self.wrong(key, f"between {low:g} and {high:g}")
        return float(value)

    def flag(self, key: str, default: bool = _REQUIRED) -> bool:
        """true or false."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def numbers(self, key: str, count: int) -> list[float] | None:
        """A list of `count` finite numbers, or None if absent."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list | tuple) or len(value) != count:
            raise self.wrong(key, f"a list of {count} numbers")
        if any(isinstance(v, bool) or not isinstance(v, int | float) or not math.isfinite(v) for v in value):
            raise self.wrong(key, f"a list of {count} finite numbers")
        return [float(v) for v in value]

    def one_of(self, key: str, allowed: tuple[Any, ...], default: Any = _REQUIRED) -> Any:
        """One of the allowed values. Any other value is an error that names it."""
        value = self._value(key, default)
        # not `in`: it would accept 1 for True
        if not any(type(value) is type(a) and value == a for a in allowed):
            names = ", ".join(repr(a) for a in allowed)
            raise self.unsupported(key, f"Transom knows {names} here")
        return value

    def inner(self, key: str) -> Values | None:
        """A nested table of settings, or None if absent."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.wrong(key, "a table of settings")
        return Values(value, f"{key} of {self.where}")

    def wrong(self, key: str, wanted: str) -> SourceError:
        """The error for an invalid value."""
        return SourceError(
            f"{self.prefix}{key} in {self.where} is {_short(self.get(key))}, not {wanted}",
            "The file is damaged or was edited by hand: download it again",
        )

    def unsupported(self, key: str, why: str = "") -> SourceError:
        """The error for a valid but unsupported value."""
        return SourceError(
            f"{self.prefix}{key} in {self.where} is {_short(self.get(key))}, which this family does not support"
            + (f" ({why})" if why else ""),
            "Export the model to ONNX, and load that file",
        )

    def _value(self, key: str, default: Any) -> Any:
        value = self.get(key)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise SourceError(
                f"{self.where} does not contain {self.prefix}{key}, which this family needs",
                "The file is incomplete: download it again",
            )
        return default


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
