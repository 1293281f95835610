"""Rotary frequencies and their scalings: default, linear, dynamic (NTK), llama3, YaRN and LongRoPE.

Sources: RoPE, Su et al. 2021 (arXiv:2104.09864); YaRN, Peng et al. 2023 (arXiv:2309.00071); LongRoPE, Ding et al. 2024
(arXiv:2402.13753); parameter names and defaults are those of transformers' `modeling_rope_utils`.

Two scalings depend on the length of the sequence. A graph has one set of frequencies, chosen for the context that the
model is loaded with, as in llama.cpp: cached keys are already rotated and cannot be rotated again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from transom.errors import SourceError
from transom.graph.weights import Array, dequantize
from transom.models.values import Values

if TYPE_CHECKING:
    from transom.models.tensors import Tensors


@dataclass(frozen=True, eq=False)
class RotaryConfig:
    """The rotary embedding of a layer's queries and keys."""

    frequencies: Array
    """Inverse frequencies, float64 [rotated / 2]."""
    rotated: int
    """How many columns of each head are rotated, starting with the first."""
    context: int
    """The longest sequence for which these frequencies are valid."""
    factor: float = 1.0
    """Multiplies cos and sin."""
    notes: tuple[str, ...] = ()


def rope_from_hf(
    values: Values,
    head_dim: int,
    context: int | None,
    *,
    theta: float = 10000.0,
    parameters: Values | None = None,
    aliases: Mapping[str, str] = {},
) -> RotaryConfig:
    """The rotary embedding that a config.json describes, in its old form (`rope_theta`, `rope_scaling`) or its new
    one (`rope_parameters`).

    Args:
        values: the config.
        head_dim: columns of a head.
        context: the requested context; None: the model's own.
        theta: the family's default base.
        parameters: the table to read instead of the config's own, if layers differ.
        aliases: the family's old names for scalings.

    Raises:
        SourceError: the scaling is unknown, or its parameters are missing or impossible.
    """
    table = parameters or values.inner("rope_parameters") or values.inner("rope_scaling") or Values({}, values.where)
    base = table.number("rope_theta", None, low=1.001) or values.number("rope_theta", theta, low=1.001)
    partial = table.number("partial_rotary_factor", None, low=0.0, high=1.0)
    if partial is None:
        partial = values.number("partial_rotary_factor", 1.0, low=0.0, high=1.0)
    longest = values.whole("max_position_embeddings")
    original = values.whole("original_max_position_embeddings", None)
    if original is None:
        original = table.whole("original_max_position_embeddings", None)
    key = "rope_type" if table.has("rope_type") else "type"
    kind = table.get(key) or "default"
    kind = aliases.get(kind, kind) if isinstance(kind, str) else kind
    rotated = int(head_dim * partial)
    if rotated < 2 or rotated % 2:
        for where in (table, values):
            if where.has("partial_rotary_factor"):
                wanted = f"one that rotates an even number of the {head_dim} columns of a head"
                raise where.wrong("partial_rotary_factor", wanted)
        raise Values({"head_dim": head_dim}, values.where).wrong("head_dim", "an even number")
    rope = plain(base, rotated, longest)
    if kind == "default":
        return rope
    if kind == "linear":
        return replace(rope, frequencies=rope.frequencies / table.number("factor", low=1e-3))
    if kind == "dynamic":
        return dynamic(rope, base, table.number("factor", low=1.0), context)
    if kind == "llama3":
        return llama3(
            rope,
            table.number("factor", low=1.0),
            table.number("low_freq_factor", low=1e-6),
            table.number("high_freq_factor", low=1e-6),
            original or longest,
        )
    if kind == "yarn":
        factor = table.number("factor", None, low=1e-3)
        original = original or longest
        return yarn(
            rope,
            base,
            factor if factor is not None else longest / original,
            original,
            attention_factor=table.number("attention_factor", None, low=1e-6),
            fast=table.number("beta_fast", None) or 32.0,
            slow=table.number("beta_slow", None) or 1.0,
            mscale=(table.number("mscale", 0.0), table.number("mscale_all_dim", 0.0)),
            truncate=table.flag("truncate", True),
        )
    if kind in ("longrope", "su"):
        count = rope.rotated // 2
        short, long = table.numbers("short_factor", count), table.numbers("long_factor", count)
        if short is None or long is None:
            raise table.wrong("short_factor" if short is None else "long_factor", f"a list of {count} numbers")
        original = original or longest
        factor = table.number("factor", None, low=1e-3) or longest / original
        attention = table.number("attention_factor", None, low=1e-6)
        for which, factors in (("short_factor", short), ("long_factor", long)):
            if min(factors) <= 0:
                raise table.wrong(which, "a list of positive numbers")
        return longrope(rope, np.array(short), np.array(long), original, factor, attention, context)
    raise table.unsupported(key, "Transom knows default, linear, dynamic, llama3, yarn and longrope")


def rope_from_gguf(
    values: Values, head_dim: int, context: int | None, tensors: Tensors, *, theta: float = 10000.0
) -> RotaryConfig:
    """The rotary embedding that a GGUF file describes: `rope.*` of its metadata, and its factor tensors.

    Raises:
        SourceError: the scaling is unknown, or its parameters are missing or impossible.
    """
    base = values.number("rope.freq_base", theta, low=1.001)
    rotated = values.whole("rope.dimension_count", head_dim, low=2, high=head_dim)
    if rotated % 2:
        raise values.wrong("rope.dimension_count", "an even number")
    longest = values.whole("context_length")
    rope = plain(base, rotated, longest)
    original = values.whole("rope.scaling.original_context_length", longest)
    attention = values.number("rope.scaling.attn_factor", None, low=1e-6)
    if tensors.has("rope_factors_long.weight") and tensors.has("rope_factors_short.weight"):
        short, long = (_factors(tensors, f"rope_factors_{which}.weight", rotated // 2) for which in ("short", "long"))
        return longrope(rope, short, long, original, longest / original, attention, context)
    if tensors.has("rope_freqs.weight"):
        rope = replace(rope, frequencies=rope.frequencies / _factors(tensors, "rope_freqs.weight", rotated // 2))
    kind = values.get("rope.scaling.type") or ("linear" if values.has("rope.scale_linear") else "none")
    if kind in ("none", "longrope"):
        return rope
    key = "rope.scaling.factor" if values.has("rope.scaling.factor") else "rope.scale_linear"
    factor = values.number(key, 1.0, low=0.0) or 1.0
    if kind == "linear":
        return replace(rope, frequencies=rope.frequencies / factor)
    if kind == "yarn":
        return yarn(
            rope,
            base,
            factor,
            original,
            attention_factor=None if attention is None else attention * (1.0 + 0.1 * math.log(factor)),
            fast=values.number("rope.scaling.yarn_beta_fast", 32.0),
            slow=values.number("rope.scaling.yarn_beta_slow", 1.0),
        )
    raise values.unsupported("rope.scaling.type", "Transom knows none, linear, yarn and longrope")


def _factors(tensors: Tensors, name: str, count: int) -> Array:
    """Divisors of the frequencies. They are read now, since they become constants of the graph."""
    factors = dequantize(tensors(name, count)).astype(np.float64)
    if (factors <= 0).any():
        raise SourceError(
            f"The tensor {name} in {tensors.checkpoint.where} has factors that are not positive",
            "The file is damaged: download it again",
        )
    return factors


def plain(base: float, rotated: int, context: int) -> RotaryConfig:
    """Unscaled frequencies: base ** (-2i / rotated)."""
    return RotaryConfig(base ** (-np.arange(0, rotated, 2, dtype=np.float64) / rotated), rotated, context)


def dynamic(rope: RotaryConfig, base: float, factor: float, context: int | None) -> RotaryConfig:
    """NTK-aware scaling, for contexts longer than the trained one."""
    if context is None or context <= rope.context:
        return rope
    exponent = rope.rotated / max(rope.rotated - 2, 1)
    stretched = base * (factor * context / rope.context - (factor - 1)) ** exponent
    note = (
        f"rotary frequencies are stretched (dynamic NTK) for a context of {context} tokens; "
        f"with a context of at most {rope.context} tokens the model is more accurate"
    )
    return replace(plain(stretched, rope.rotated, context), notes=(note,))


def llama3(rope: RotaryConfig, factor: float, low: float, high: float, original: int) -> RotaryConfig:
    """Llama 3.1: long wavelengths divided by `factor`, short ones kept, a smooth ramp between."""
    wavelength = 2 * math.pi / rope.frequencies
    smooth = (
        np.clip((original / wavelength - low) / (high - low), 0.0, 1.0) if high > low else wavelength < original / low
    )
    return replace(rope, frequencies=(1 - smooth) * rope.frequencies / factor + smooth * rope.frequencies)


def yarn(
    rope: RotaryConfig,
    base: float,
    factor: float,
    original: int,
    *,
    attention_factor: float | None,
    fast: float,
    slow: float,
    mscale: tuple[float, float] = (0.0, 0.0),
    truncate: bool = True,
) -> RotaryConfig:
    """YaRN: interpolate slow dimensions, keep fast ones, scale attention by `attention_factor`."""

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    def dimension(rotations: float) -> float:
        return rope.rotated * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    if attention_factor is None:
        attention_factor = magnitude(mscale[0]) / magnitude(mscale[1]) if all(mscale) else magnitude(1.0)
    low, high = dimension(fast), dimension(slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotated - 1)
    ramp = np.clip((np.arange(rope.rotated // 2) - low) / ((high - low) or 0.001), 0.0, 1.0)
    return replace(
        rope,
        frequencies=rope.frequencies / factor * ramp + rope.frequencies * (1 - ramp),
        factor=attention_factor,
    )


def longrope(
    rope: RotaryConfig,
    short: Array,
    long: Array,
    original: int,
    factor: float,
    attention: float | None,
    context: int | None,
) -> RotaryConfig:
    """LongRoPE: the short factors for a context of up to `original` tokens (the default), the long ones beyond."""
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1.0 and original > 1 else 1.0
    if context is None or context <= original:
        note = (
            f"the short rotary factors are used, for a context of {original} tokens; "
            f"request a longer context, up to {rope.context}, to use the long ones"
        )
        notes = (note,) if rope.context > original else ()
        return replace(
            rope,
            frequencies=rope.frequencies / short,
            factor=attention,
            context=min(original, rope.context),
            notes=notes,
        )
    note = f"the long rotary factors are used; with a context of at most {original} tokens the model is more accurate"
    return replace(rope, frequencies=rope.frequencies / long, factor=attention, notes=(note,))
