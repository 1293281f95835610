"""The values of a bundle's manifest, each of the type that `docs/bundles.md` says: what was cut, altered or made up on
the way is found where it is read, and not where it is used."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transom.contract import Device
from transom.errors import OptionError
from transom.hardware.probe_file import from_json
from transom.signature import Decoder, LayerCache
from transom.sources.resolve import BUNDLE_MANIFEST

MALFORMED = (ValueError, KeyError, TypeError, AttributeError, RecursionError, OptionError)
"""What reading a manifest raises where something in it is missing, or of the wrong type."""
_LARGEST = 2**63 - 1


def text(value: object) -> str:
    """The value, where it is a text. Raises TypeError."""
    if not isinstance(value, str):
        raise TypeError("not a text")
    return value


def count(value: object, least: int = 0) -> int:
    """The value, where it is a whole number from `least` on, of 63 bits at most. Raises ValueError."""
    if type(value) is not int or not least <= value <= _LARGEST:
        raise ValueError("not a count")
    return value


def flag(value: object) -> bool:
    """The value, where it is true or false. Raises TypeError."""
    if not isinstance(value, bool):
        raise TypeError("neither true nor false")
    return value


def items(value: object) -> list[Any]:
    """The value, where it is a list. Raises TypeError."""
    if not isinstance(value, list):
        raise TypeError("not a list")
    return value


def texts(value: object) -> tuple[str, ...]:
    """The value, where it is a list of texts. Raises TypeError."""
    return tuple(map(text, items(value)))


def shape(value: object) -> tuple[int | str | None, ...]:
    """Of an input: sizes, names of sizes, and None. Raises TypeError, ValueError."""
    return tuple(d if d is None or isinstance(d, str) else count(d) for d in items(value))


def decoder(whole: Any) -> Decoder:
    """The object `decoder`; unknown keys are passed over. Raises what is in `MALFORMED`."""
    layers = [
        LayerCache(**{f.name: count(layer[f.name]) for f in fields(LayerCache)}) for layer in items(whole["layers"])
    ]
    sizes = {f.name: count(whole[f.name]) for f in fields(Decoder) if f.name not in ("family", "layers")}
    return Decoder(family=text(whole["family"]), layers=tuple(layers), **sizes)


def device(whole: Any) -> Device:
    """An object `target`; unknown keys are passed over. Raises what is in `MALFORMED`."""
    known = {f.name: whole[f.name] for f in fields(Device) if f.name in whole}
    return from_json({"devices": [known]}, BUNDLE_MANIFEST)[0]
