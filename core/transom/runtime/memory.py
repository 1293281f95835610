"""Memory is planned before anything is compiled or loaded; what does not fit is refused with what would.

The plan is arithmetic on the model's sizes, not a measurement: weights in the form they will be kept, the cache of one
full context, and the working space of one prefill chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

from transom.contract import Device
from transom.errors import DoesNotFit, OptionError
from transom.signature import Decoder

CHUNK = 1024
"""Tokens of a prefill chunk, for the working space."""
ENGINE_BYTES = 160 * 2**20
"""What an interpreter with an engine holds before it opens a model."""
LEAST_CONTEXT = 256
"""`auto` gives no shorter context than this (or the model's own, if that is shorter)."""

_WEIGHT_BYTES = {"f32": 4.0, "bf16": 2.0, "f16": 2.0, "int8": 1.07, "int4": 0.57}
_SMALLER = ("f32", "bf16", "int8", "int4")


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes a model will need on a device, and the context they allow."""

    weights: int
    cache: int
    """Of one sequence at full context."""
    workspace: int
    available: int
    context: int
    """Tokens."""
    model_context: int
    note: str = ""
    """Said in the report when the context is shorter than the model's."""

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.workspace

    def parts(self) -> dict[str, int]:
        """Bytes by use, and what is available: for the report."""
        names = ("weights", "cache", "workspace", "available")
        return {name: getattr(self, name) for name in names}


def weight_bytes(decoder: Decoder, precision: str, *, exact_float32: bool = False) -> int:
    """Bytes of the weights as a backend keeps them; `auto` keeps the checkpoint's own form."""
    if exact_float32:
        return decoder.parameters * 4
    if precision in _WEIGHT_BYTES:
        return int(decoder.parameters * _WEIGHT_BYTES[precision])
    return decoder.weight_bytes


def plan(
    decoder: Decoder, device: Device, *, context: int | None, precision: str = "auto", exact_float32: bool = False
) -> MemoryPlan:
    """Plan a decoder on a device.

    Args:
        context: tokens asked for, or None for the model's own, cut to what fits (said in the plan's note).
        exact_float32: the backend keeps everything in float32 (the reference does).

    Raises:
        DoesNotFit: with the context length or the precision that would.
        OptionError: the context is not positive or longer than the model was made for.
    """
    if context is not None and not 0 < context <= decoder.context:
        raise OptionError(
            f"context={context} is outside 1 … {decoder.context}, the model's own limit",
            "Ask for less, or leave it out",
        )
    available = device.free_bytes if device.free_bytes is not None else device.memory_bytes
    element = 4 if exact_float32 or precision == "f32" else 2
    per_token = decoder.cache_bytes(1, element)
    weights = weight_bytes(decoder, precision, exact_float32=exact_float32)
    widest = max(decoder.hidden * 16, 1)
    workspace = ENGINE_BYTES + CHUNK * widest * 4 + decoder.vocabulary * 4 * 8
    room = available - weights - workspace
    fits = max(0, min(decoder.context, room // max(per_token, 1)))
    asked = context if context is not None else decoder.context
    result = MemoryPlan(weights, decoder.cache_bytes(asked, element), workspace, available, asked, decoder.context)
    if asked <= fits:
        return result
    if context is None and fits >= min(LEAST_CONTEXT, decoder.context):
        note = (
            f"context cut to {fits} of the model's {decoder.context} tokens: {size(available)} are free and the whole "
            f"would need {size(result.total)}"
        )
        return MemoryPlan(
            weights, decoder.cache_bytes(fits, element), workspace, available, fits, decoder.context, note
        )
    raise DoesNotFit(
        f"the model needs {size(result.total)} on {device.id} ({size(weights)} weights, {size(result.cache)} cache for "
        f"{asked} tokens, {size(workspace)} working space) and {size(available)} are free",
        _way_out(decoder, fits, room, available - workspace, weights, precision, exact_float32),
    )


def _way_out(
    decoder: Decoder, fits: int, room: int, for_weights: int, weights: int, precision: str, exact_float32: bool
) -> str:
    if room > 0 and fits >= 1:
        return f"A context of {fits} tokens would fit: context={fits}"
    if not exact_float32:
        for smaller in _SMALLER:
            needed = weight_bytes(decoder, smaller)
            if needed < min(weights, for_weights) and smaller != precision:
                return f"precision={smaller!r} would fit ({size(needed)} weights)"
    return f"Free {size(weights - for_weights)} of memory, or use a smaller model or another device"


def size(count: int) -> str:
    """Bytes for people: `1.5 GB`, `320 MB` (powers of ten)."""
    value = float(count)
    for unit in ("B", "KB", "MB"):
        if abs(value) < 1000:
            return f"{value:.0f} {unit}"
        value /= 1000
    return f"{value:.1f} GB" if value < 1000 else f"{value / 1000:.1f} TB"
