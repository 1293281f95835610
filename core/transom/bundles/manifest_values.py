"""Checks the types of the values in a bundle's manifest as `docs/bundles.md` specifies them.

Truncated or forged content is thus found when the manifest is read, not when it is used.
"""

from __future__ import annotations

import sys
from dataclasses import fields
from typing import Any

from transom.contract import Device
from transom.errors import OptionError
from transom.hardware.probe_file import from_json
from transom.signature import Decoder, LayerCache
from transom.sources.resolve import BUNDLE_MANIFEST

MALFORMED = (ValueError, KeyError, TypeError, AttributeError, RecursionError, OptionError)
"""Errors that reading a manifest raises for a missing value or one of the wrong type."""
_LARGEST = 2**63 - 1


def text(value: object) -> str:
    """The value if it is a string. Raises TypeError."""
    if not isinstance(value, str):
        raise TypeError("not a text")
    return value


def count(value: object, least: int = 0) -> int:
    """The value if it is an integer of at least `least` and at most 63 bits. Raises ValueError."""
    if type(value) is not int or not least <= value <= _LARGEST:
        raise ValueError("not a count")
    return value


def number(value: object) -> float:
    """The value if it is a finite number above 0. Raises ValueError."""
    if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:  # type: ignore[operator]
        raise ValueError("not a number above 0")
    return float(value)  # type: ignore[arg-type]


def finite(value: object) -> float:
    """The value if it is a finite number. Raises ValueError."""
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:  # type: ignore[arg-type]
        raise ValueError("not a finite number")
    return float(value)  # type: ignore[arg-type]


def fidelity(whole: Any) -> dict[str, Any]:
    """An object `fidelity`; unknown keys are ignored. Raises an error of `MALFORMED`."""
    numbers = {name: finite(whole[name]) for name in ("kl", "top1", "cosine")}
    return {"where": text(whole["where"]), "tokens": count(whole["tokens"]), **numbers}


def flag(value: object) -> bool:
    """The value if it is a boolean. Raises TypeError."""
    if not isinstance(value, bool):
        raise TypeError("neither true nor false")
    return value


def items(value: object) -> list[Any]:
    """The value if it is a list. Raises TypeError."""
    if not isinstance(value, list):
        raise TypeError("not a list")
    return value


def texts(value: object) -> tuple[str, ...]:
    """The value if it is a list of strings. Raises TypeError."""
    return tuple(map(text, items(value)))


def shape(value: object) -> tuple[int | str | None, ...]:
    """The shape of an input: sizes, names of sizes, and None. Raises TypeError, ValueError."""
    return tuple(d if d is None or isinstance(d, str) else count(d) for d in items(value))


def decoder(whole: Any) -> Decoder:
    """The object `decoder`; unknown keys are ignored. Raises an error of `MALFORMED`."""
    layers = [
        LayerCache(**{f.name: count(layer[f.name]) for f in fields(LayerCache)}) for layer in items(whole["layers"])
    ]
    sizes = {f.name: count(whole[f.name]) for f in fields(Decoder) if f.name not in ("family", "layers")}
    return Decoder(family=text(whole["family"]), layers=tuple(layers), **sizes)


def device(whole: Any) -> Device:
    """An object `target`; unknown keys are ignored. Raises an error of `MALFORMED`."""
    known = {f.name: whole[f.name] for f in fields(Device) if f.name in whole}
    return from_json({"devices": [known]}, BUNDLE_MANIFEST)[0]
