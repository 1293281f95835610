"""Plans memory before anything is compiled or loaded. A model that does not fit is refused, with settings that fit.

The plan is computed from the model's sizes, not measured: the weights in their final form, the KV cache of one full
context, and the working space of one prefill chunk. If a device does not report its memory, nothing is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

from transom.contract import Device, Options
from transom.errors import DoesNotFit, OptionError, option
from transom.signature import Decoder

CHUNK = 1024
"""Tokens in a prefill chunk, which determines the working space."""
ENGINE_BYTES = 160 * 2**20
"""Memory of an interpreter with an engine before it opens a model."""
MIN_CONTEXT = 256
"""Shortest context to which `auto` reduces, or the model's own if that is shorter."""
STEP = 64
"""A reduced context is a multiple of this, so that it does not change with every page of free memory."""

_WEIGHT_BYTES = {"f32": 4.0, "exact": 4.0, "bf16": 2.0, "f16": 2.0, "int8": 1.07, "fp8": 1.0, "int4": 0.57}
_SMALLER = ("bf16", "int8", "int4")


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a model will need on a device, and the context that fits."""

    weights: int
    cache: int
    """Bytes of the KV cache for one sequence of `context` tokens."""
    workspace: int
    available: int
    """Free bytes of the device; 0 where unknown."""
    context: int
    """Tokens of the longest sequence."""
    model_context: int
    note: str = ""
    """Warning for the report where the context was reduced."""

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.workspace

    def parts(self) -> dict[str, int]:
        """Bytes by use, and the available ones, for the report."""
        names = ("weights", "cache", "workspace", "available")
        return {name: getattr(self, name) for name in names}


def plan(
    decoder: Decoder, device: Device, *, context: int | None, precision: str = "auto", exact_float32: bool = False
) -> MemoryPlan:
    """Plan a decoder on a device.

    Args:
        context: requested tokens; None for the model's own, reduced to what fits (see `MemoryPlan.note`).
        exact_float32: whether the backend keeps everything in float32, as the reference does.

    Raises:
        DoesNotFit: it does not fit; names a context and a precision that would.
        OptionError: the context is longer than the model's own.
    """
    require_context(decoder, context)
    sizes = _Sizes(decoder, device, precision, exact_float32)
    requested = context if context is not None else decoder.context
    whole = sizes.plan(requested)
    if sizes.longest >= requested:
        return whole
    longest = sizes.longest if sizes.longest < STEP else sizes.longest // STEP * STEP
    if context is None and longest >= min(MIN_CONTEXT, decoder.context):
        return sizes.plan(
            longest,
            f"The context is reduced to {longest} of the model's {decoder.context} tokens: {size(whole.available)} of "
            f"memory are free, and the whole would need {size(whole.total)}",
        )
    raise DoesNotFit(
        f"The model needs {size(whole.total)} on {device.id} ({size(whole.weights)} for weights, {size(whole.cache)} "
        f"for a cache of {requested} tokens, {size(whole.workspace)} of working space), and {size(whole.available)} "
        "are free",
        _fix(sizes, longest, context),
    )


def plan_for(decoder: Decoder | None, device: Device, options: Options, band: str) -> MemoryPlan | None:
    """Plan a load with these options on a backend whose offer has this band.

    None for a graph that is not a decoder. Raises as `plan`.
    """
    if decoder is None:
        return None
    context, precision = options["context"], options["precision"]
    assert context is None or isinstance(context, int)
    return plan(decoder, device, context=context, precision=str(precision), exact_float32=band == "fallback")


def require_context(decoder: Decoder, context: int | None) -> None:
    """Raise OptionError for a context that is longer than the model's own."""
    if context is not None and not 0 < context <= decoder.context:
        raise OptionError(
            f"{option('context', context)} is outside 1 … {decoder.context}, the model's own limit",
            "Ask for less, or leave it out",
        )


class _Sizes:
    """Memory sizes of a decoder in one precision on one device."""

    def __init__(self, decoder: Decoder, device: Device, precision: str, exact_float32: bool) -> None:
        self.decoder, self.device, self.precision, self.exact_float32 = decoder, device, precision, exact_float32
        self.available = device.free_bytes if device.free_bytes is not None else device.memory_bytes
        self.weights = weight_bytes(decoder, precision, exact_float32=exact_float32)
        self.workspace = ENGINE_BYTES + CHUNK * decoder.hidden * 16 * 4 + decoder.vocabulary * 4 * 8
        self._element = 4 if exact_float32 or precision in ("f32", "exact") else 2
        self.room = self.available - self.weights - self.workspace

    @property
    def longest(self) -> int:
        """Tokens of context that fit."""
        if not self.available:
            return self.decoder.context
        return max(0, min(self.decoder.context, self.room // max(self.decoder.cache_bytes(1, self._element), 1)))

    def plan(self, context: int, note: str = "") -> MemoryPlan:
        cache = self.decoder.cache_bytes(context, self._element)
        return MemoryPlan(
            self.weights, cache, self.workspace, self.available, context, self.decoder.context, note
        )  # fmt: skip

    def in_precision(self, precision: str) -> _Sizes:
        return _Sizes(self.decoder, self.device, precision, self.exact_float32)


def _fix(sizes: _Sizes, longest: int, context: int | None) -> str:
    wanted = context if context is not None else min(MIN_CONTEXT, sizes.decoder.context)
    ways = [f"a context of {longest} tokens would: {option('context', longest)}"] if longest > 0 else []
    if not sizes.exact_float32:
        smaller = [sizes.in_precision(name) for name in _SMALLER]
        fitting = next((s for s in smaller if s.weights < sizes.weights and s.longest >= wanted), None)
        if fitting is not None:
            ways.append(f"{option('precision', fitting.precision)} would, with {size(fitting.weights)} for weights")
    if ways:
        return f"It does not fit; {', and '.join(ways)}"
    short = size(max(1, -sizes.room))
    return f"Free {short} of memory, use a smaller model, or another device or backend"


def weight_bytes(decoder: Decoder, precision: str, *, exact_float32: bool = False) -> int:
    """Bytes of the weights as a backend keeps them, at most those of the checkpoint.

    Quantized weights of a checkpoint stay quantized in every precision but the reference's.
    """
    if exact_float32:
        return decoder.parameters * 4
    return min(decoder.weight_bytes, int(decoder.parameters * _WEIGHT_BYTES.get(precision, 4.0)))


def size(count: int) -> str:
    """Bytes in human-readable form, in powers of ten: `1.5 GB`, `320 MB`."""
    value = float(count)
    for unit in ("B", "KB", "MB"):
        if abs(value) < 1000:
            return f"{value:.0f} {unit}"
        value /= 1000
    return f"{value:.1f} GB" if value < 1000 else f"{value / 1000:.1f} TB"
