"""Sparsity policies: `Sparsity` says which keys attention reads, and `LayerSparsity` is its view of one layer.

A policy is checked when it is created. Presets have names, and every policy can be written as JSON. The canonical
string of a layer is the attribute `sparsity` of `transom::CachedAttention`.

A policy says how units of keys are scored and how many of them are read. The NumPy reference,
`transom.ops.sparse_routing`, defines exactly which keys these are. The method is called node routing and is described
in `docs/sparsity.md`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.errors import OptionError, nearest, option
from transom.sparsity.files import policy_values

if TYPE_CHECKING:
    from transom.signature import Decoder

BLOCK = 64
"""Queries that share one selection of keys, and tokens in a page of a paged cache."""
LARGEST = 2**30
"""Of a count of tokens, columns or units: more than any context, and kernels may add two of them as 32-bit integers."""
SCORES = ("rms", "mean")
DENSE = "dense"
"""The canonical string of a layer, and of a policy, that reads every key."""

Heads = tuple[tuple[float, ...], ...]
"""The multiplier of 1 - coverage for each layer and KV head; 0 is a head that stays dense."""


@dataclass(frozen=True)
class Sparsity:
    """Which keys each block of queries reads. Immutable; every value is checked on creation.

    Raises:
        OptionError: a value is outside its range; the message names field, value and range.
    """

    coverage: float = 0.94
    """Share of the estimated attention mass that is read, above 0 and at most 1. 1 reads everything: dense."""
    local_window: int = 64
    """Tokens before a block of queries that all of its queries read, at least 1; rounded up to whole blocks of 64."""
    columns: int = 64
    """Number of keys with the most mass over all queries, read by every query. 0: the first block of keys instead."""
    node: int = 8
    """Tokens that one node (mean, variance, count) stands for. Divides `unit`."""
    unit: int = 16
    """Tokens that are selected together. Divides 64."""
    rows: int = 16
    """Queries of a block of 64 that the score uses. Divides 64."""
    min_density: float = 0.0
    """Minimum share of the units that is read, regardless of the coverage."""
    max_density: float = 1.0
    """Maximum share of the units that is read, apart from those that are always read. Above 0.6, a block that would
    read more than 0.6 of its keys reads all of them: whole tiles in order are then faster than gathered ones."""
    dense_below: int = 1024
    """A block of queries that has this many keys or fewer reads all of them."""
    top_k: int = 0
    """Above 0: read this many units besides those that are always read, instead of a coverage (static shapes)."""
    heads: Heads | None = None
    """The calibration of one model: a multiplier of 1 - coverage for each layer and KV head; 0 is a dense head. None:
    not calibrated; every head has the same coverage."""
    score: str = field(default="rms", kw_only=True)
    """`"rms"`: masses from mean and variance, exact for nearby keys; root mean square over the rows. `"mean"`, the
    textbook form: masses from the mean key alone, also for nearby keys; mean over the rows."""

    def __post_init__(self) -> None:
        for name, low, open_low in (("coverage", 0.0, True), ("min_density", 0.0, False), ("max_density", 0.0, True)):
            object.__setattr__(self, name, _share(name, getattr(self, name), low, open_low))
        for name, least in (("local_window", 1), ("columns", 0), ("dense_below", 0), ("top_k", 0)):
            object.__setattr__(self, name, _count(name, getattr(self, name), least))
        for name in ("node", "unit", "rows"):
            value = _count(name, getattr(self, name), 1)
            if BLOCK % value:
                raise OptionError(f"{name}={value} does not divide {BLOCK}", f"Use one of {_divisors(BLOCK)}.")
            object.__setattr__(self, name, value)
        if self.unit % self.node:
            raise OptionError(
                f"node={self.node} does not divide unit={self.unit}, so nodes would lie across units",
                f"Use one of {_divisors(self.unit)} for node, or a larger unit.",
            )
        if self.min_density > self.max_density:
            raise OptionError(
                f"min_density={self.min_density:g} is above max_density={self.max_density:g}", "Swap them."
            )
        if self.score not in SCORES:
            raise OptionError(f"score={self.score!r} is unknown", nearest(str(self.score), SCORES))
        object.__setattr__(self, "heads", _heads(self.heads))

    @property
    def dense(self) -> bool:
        """Whether every key is read, regardless of the other fields."""
        return self.top_k == 0 and self.coverage >= 1.0

    @property
    def calibrated(self) -> bool:
        """Whether it has the heads of a model."""
        return self.heads is not None

    def __str__(self) -> str:
        """For display: the preset's name, or the nearest preset and the fields that differ."""
        if self.dense:
            return "off"
        found = {name: _differing(self, PRESETS[name]) for name in ("balanced", "safe", "fast", "classic")}
        name = min(found, key=lambda n: len(found[n]))
        return name + (" with " if found[name] else "") + ", ".join(f"{n}={getattr(self, n)!r}" for n in found[name])

    # one layer, one model ---------------------------------------------------------------------------------------------
    def layer(self, index: int) -> LayerSparsity:
        """The view of one layer: the same rule, and its own heads.

        Raises:
            OptionError: the heads belong to a model with fewer layers.
        """
        if self.dense:
            return LayerSparsity(None)
        if self.heads is not None and index >= len(self.heads):
            raise OptionError(
                f"The sparsity policy has heads for {len(self.heads)} layers, and there is a layer {index}",
                "Use the file that was made for this model.",
            )
        heads = None if self.heads is None else self.heads[index]
        return LayerSparsity(replace(self, heads=None), heads)

    def for_model(self, decoder: Decoder) -> Sparsity:
        """This policy, after checking that its heads match the model.

        Raises:
            OptionError: it has heads for another number of layers or KV heads.
        """
        if self.heads is None:
            return self
        if len(self.heads) != len(decoder.layers):
            raise OptionError(
                f"The sparsity policy has heads for {len(self.heads)} layers, and the model has {len(decoder.layers)}",
                "Use the file that was made for this model, or none.",
            )
        for i, (heads, layer) in enumerate(zip(self.heads, decoder.layers, strict=True)):
            if len(heads) != layer.kv_heads:
                raise OptionError(
                    f"The sparsity policy has {len(heads)} heads for layer {i}, and the model has {layer.kv_heads} KV "
                    "heads there",
                    "Use the file that was made for this model, or none.",
                )
        return self

    def with_heads(self, heads: Heads | None) -> Sparsity:
        """The same rule with the heads of a model, unless it has heads of its own."""
        return self if self.heads is not None or heads is None else replace(self, heads=heads)

    # text -------------------------------------------------------------------------------------------------------------
    def to_dict(self) -> dict[str, Any]:
        """JSON types, every field."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return fields | {"heads": None if self.heads is None else [list(layer) for layer in self.heads]}

    def to_string(self) -> str:
        """The canonical form of the whole policy, for `Work.sparsity`: `"dense"`, or JSON of every field, keys sorted
        and without spaces, `heads` a list for each layer. Equal policies have equal strings."""
        if self.dense:
            return DENSE
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_string(cls, text: str) -> Sparsity:
        """The policy of a canonical string.

        Raises:
            OptionError: the string is not a policy.
        """
        return _from_string(text)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = "The sparsity policy") -> Sparsity:
        """A policy from JSON types. Missing fields come from `preset` (default `"balanced"`).

        Raises:
            OptionError: an unknown key or preset, or an invalid value.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        given = dict(values)
        name = given.pop("preset", "balanced")
        base = PRESETS.get(name) if isinstance(name, str) else None
        if base is None:
            raise OptionError(f"{where} has the unknown preset {name!r}", nearest(str(name), PRESETS))
        for key in given:
            if key not in known:
                raise OptionError(f"{where} has the unknown key {key!r}", nearest(str(key), known | {"preset"}))
        if "heads" in given:
            given["heads"] = _heads(given["heads"])
        return replace(base, **given)

    @classmethod
    def parse(cls, value: object) -> Sparsity:
        """A policy from user input: a preset's name, a coverage, a JSON file, a mapping, or a policy; None is off.

        Raises:
            OptionError: it is none of these, or the file cannot be read or is invalid.
        """
        if value is None:
            return PRESETS["off"]
        if isinstance(value, Sparsity):
            return value
        if isinstance(value, Mapping):
            return cls.from_dict(value)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return replace(PRESETS["balanced"], coverage=float(value))
        if isinstance(value, Path):
            return _from_file(value)
        if not isinstance(value, str):
            raise OptionError(
                f"sparsity is a {type(value).__name__}", f"Give a name ({', '.join(PRESETS)}), a coverage, or a file."
            )
        return _from_text(value)


@dataclass(frozen=True)
class LayerSparsity:
    """What one layer reads: the rule, and the multipliers of its heads."""

    rule: Sparsity | None
    """The policy without heads; None: read every key."""
    heads: tuple[float, ...] | None = None
    """The multiplier of 1 - coverage for each KV head; None: 1 for all."""

    @property
    def dense(self) -> bool:
        """Whether every head reads every key."""
        return self.rule is None or self.rule.dense or (self.heads is not None and not any(self.heads))

    def coverage(self, head: int) -> float:
        """Share of the attention mass that this KV head covers; 1: it reads everything."""
        if self.rule is None or self.dense_head(head):
            return 1.0
        loose = 1.0 if self.heads is None else self.heads[head]
        return max(0.0, 1.0 - (1.0 - self.rule.coverage) * loose)

    def dense_head(self, head: int) -> bool:
        """Whether this KV head, or the whole layer, reads every key."""
        return self.dense or (self.heads is not None and self.heads[head] == 0)

    def to_string(self) -> str:
        """`"dense"`, or JSON of every field of the rule, keys sorted and without spaces, with `heads` a list of one
        number for each KV head, or null where all are 1. Equal views have equal strings."""
        if self.rule is None or self.dense:
            return DENSE
        loose = None if self.heads is None or all(h == 1 for h in self.heads) else list(self.heads)
        return json.dumps(self.rule.to_dict() | {"heads": loose}, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_string(cls, text: str) -> LayerSparsity:
        """The view of an attribute's value.

        Raises:
            ValueError: it is not the canonical string of a layer.
        """
        if text == DENSE:
            return cls(None)
        try:
            values = json.loads(text)
            if not isinstance(values, dict):
                raise ValueError("not an object")
            heads = values.pop("heads", None)
            rule = Sparsity.from_dict({**values, "heads": None if heads is None else [heads]})
        except (ValueError, RecursionError, OptionError) as error:
            raise ValueError(f"unknown sparsity policy {text[:200]!r}: {error}") from error
        view = rule.layer(0)
        return view if view.rule is not None else cls(None)


def _from_text(text: str) -> Sparsity:
    stripped = text.strip()
    if stripped in PRESETS:
        return PRESETS[stripped]
    if stripped == DENSE:
        return PRESETS["off"]
    if stripped.startswith("{"):
        return _from_string(stripped)
    try:
        return replace(PRESETS["balanced"], coverage=float(stripped))
    except ValueError:  # not a number; an OptionError about a number is not a ValueError and passes through
        pass
    path = Path(stripped).expanduser()
    if path.suffix == ".json" or path.is_file():
        return _from_file(path)
    raise OptionError(
        f"{option('sparsity', text)} is unknown",
        f"{nearest(stripped, PRESETS)} Or give a coverage such as 0.94, or a JSON file.",
    )


def _from_file(path: Path) -> Sparsity:
    return Sparsity.from_dict(policy_values(path), where=str(path))


@lru_cache(maxsize=64)
def _from_string(text: str) -> Sparsity:
    if text == DENSE:
        return PRESETS["off"]
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise OptionError(f"{text[:80]!r} is not a sparsity policy", 'Give "dense" or a JSON object.')
    return Sparsity.from_dict(values)


def _differing(policy: Sparsity, preset: Sparsity) -> list[str]:
    names = [f.name for f in dataclasses.fields(policy) if f.name != "heads"]
    return [name for name in names if getattr(policy, name) != getattr(preset, name)]


def _share(name: str, value: object, low: float, open_low: bool) -> float:
    allowed = f"Allowed: a number above {low:g}, up to 1." if open_low else f"Allowed: a number from {low:g} to 1."
    good = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= 1  # NaN is not
    if not good or (open_low and value == low):
        raise OptionError(f"{name}={_short(value)} is not allowed", allowed)
    return float(value)  # type: ignore[arg-type]


def _count(name: str, value: object, least: int) -> int:
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not whole or not least <= int(value) <= LARGEST:  # type: ignore[call-overload]
        raise OptionError(
            f"{name}={_short(value)} is not allowed", f"Allowed: a whole number from {least} to {LARGEST}."
        )
    return int(value)  # type: ignore[call-overload, no-any-return]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"


def _divisors(of: int) -> str:
    found = [str(n) for n in range(1, of + 1) if of % n == 0]
    return ", ".join(found)


def _heads(value: object) -> Heads | None:
    if value is None:
        return None
    shape = "Allowed: for each layer a list of numbers, one for each KV head, 0 or more."
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise OptionError(f"heads is a {type(value).__name__}, not a list of layers", shape)
    layers: list[tuple[float, ...]] = []
    for i, layer in enumerate(value):
        if not isinstance(layer, Sequence) or isinstance(layer, str) or not layer:
            raise OptionError(f"heads of layer {i} is {layer!r}, not a list of numbers", shape)
        layers.append(tuple(_multiplier(i, h, number) for h, number in enumerate(layer)))
    return tuple(layers)


def _multiplier(layer: int, head: int, value: object) -> float:
    good = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max
    if not good:
        raise OptionError(
            f"heads has {_short(value)} for layer {layer}, head {head}",
            "Allowed: a number of 0 or more; 0 is a dense head.",
        )
    return float(value)  # type: ignore[arg-type]


PRESETS: Mapping[str, Sparsity] = {
    "off": Sparsity(1.0),
    "classic": Sparsity(0.95, local_window=512, columns=0, node=64, unit=64, score="mean"),
    "safe": Sparsity(0.96),
    "balanced": Sparsity(0.94),
    "fast": Sparsity(0.9, rows=8),
}
"""Policies by name. `classic` is the textbook form, kept for comparison: one mean node for every 64 tokens."""
