"""Chooses the form of each matrix, stored or quantized, and records the quantization error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transom.graph.weights import Blocked, Dense, Weight, dequantize
from transom.quantize.rounding import to_int4, to_int8
from transom_mobile_export.onnx.packing import block_of
from transom_mobile_export.onnx.precision import OnnxPrecision

BLOCK = 32
"""Columns that share a scale in matrices that are quantized here."""


def form_of(weight: Weight, precision: OnnxPrecision, *, vocabulary: bool) -> Weight:
    """The matrix as it is written: unchanged, or quantized or unpacked when it is read.

    Args:
        vocabulary: whether it is the vocabulary matrix or the table of embeddings, whose errors show at once.
    """
    if precision.exact or block_of(weight):
        return weight
    fits = weight.shape[1] % BLOCK == 0
    if isinstance(weight, Blocked):  # of floats, or in blocks that the layout does not support
        return to_int8(weight, BLOCK) if fits else Dense(weight.shape, "float32", lambda: dequantize(weight))
    if not precision.quantized or not fits:
        return weight
    return to_int4(weight, BLOCK) if precision.quantized == "int4" and not vocabulary else to_int8(weight, BLOCK)


@dataclass(frozen=True)
class QuantizedWeight:
    """The quantization error of one matrix."""

    name: str
    """Name of the product in the graph, or `embedding`."""
    before: str
    after: str
    error: float
    """‖W - Ŵ‖ / ‖W‖."""


def named(weight: Weight) -> str:
    """A matrix's form, human-readable: `"int4 in blocks of 32"`."""
    return weight.dtype if isinstance(weight, Dense) else f"{weight.dtype} in blocks of {weight.block}"


def notes(quantized: Sequence[QuantizedWeight]) -> list[str]:
    """One line for each form that matrices were quantized to."""
    found = []
    for before, after in sorted({(r.before, r.after) for r in quantized}):
        errors = [r.error for r in quantized if (r.before, r.after) == (before, after)]
        worst = max((r for r in quantized if (r.before, r.after) == (before, after)), key=lambda r: r.error)
        found.append(
            f"{len(errors)} matrices in {before} were quantized to {after}: off by {sum(errors) / len(errors):.2%} "
            f"(mean), worst {worst.name} by {worst.error:.2%}"
        )
    return found
