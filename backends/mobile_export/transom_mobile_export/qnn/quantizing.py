"""Quantizes matrices to the two forms that the HTP multiplies: int8 by rows and int4 in blocks, both symmetric.

The scale of a 4-bit block is the candidate with the smallest squared error of its numbers, each weighted by the mean
square of its input, which is the diagonal of the Hessian of Frantar et al. 2023 (GPTQ, arXiv:2210.17323). On
SmolLM2-135M the divergence of `int4` is two fifths lower than with scales that just cover the largest number.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from transom.errors import OptionError, option
from transom.graph.weights import Array, Blocked, BlockedArrays, Weight, dequantize, preloaded
from transom.quantize.rounding import to_int4, to_int8
from transom_mobile_export.qnn.precision import BLOCK, Form

CANDIDATES = np.linspace(0.6, 1.1, 18, dtype=np.float32)
"""Candidates for a block's scale, in units of the scale that just covers its largest number."""
LOW, HIGH = -8, 7
AT_ONCE = 1 << 21
"""Numbers that are quantized at a time."""


def quantized(weight: Weight, form: Form, squares: Array | None = None) -> Blocked:
    """A matrix in symmetric int8 by rows or int4 in blocks. A matrix already stored in this form is kept, except int8
    with negative scales.

    Args:
        squares: mean square of each column's input, in any unit; None: all equal.

    Raises:
        OptionError: its rows are not a multiple of a block.
    """
    block = weight.shape[1] if form == "int8" else BLOCK
    if isinstance(weight, Blocked) and _is_symmetric(weight, form, block):
        return weight if form == "int4" else replace(weight, load=lambda: _with_positive_scales(weight))
    if form == "int8":
        return to_int8(weight)
    if weight.shape[1] % BLOCK:
        raise OptionError(
            f"{option('precision', 'int4')} quantizes blocks of {BLOCK} columns, and a matrix has {weight.shape[1]}",
            f"Use {option('precision', 'int8')}",
        )
    widest = to_int4(weight, BLOCK)
    return replace(widest, load=lambda: _searched(weight, widest, squares))


def _is_symmetric(weight: Blocked, form: Form, block: int) -> bool:
    return weight.dtype == form and weight.block == block and not weight.has_zero_points and not weight.has_minimums


def _with_positive_scales(weight: Blocked) -> BlockedArrays:
    """The HTP silently computes int8 rows with a negative scale wrongly; int4 is right (QNN 2.51)."""
    parts = weight.load()
    return parts if (parts.scales >= 0).all() else to_int8(weight).load()


def _searched(weight: Weight, widest: Blocked, squares: Array | None) -> BlockedArrays:
    rows, columns = weight.shape
    blocks = columns // BLOCK
    plain, start_scales = preloaded(weight), widest.load().scales.astype(np.float32)
    start_scales = np.maximum(start_scales, np.float32(np.finfo(np.float16).tiny))
    weigh = np.ones((blocks, BLOCK), np.float32)
    if squares is not None and squares.any():
        weigh = (squares / squares.mean() + 1e-3).astype(np.float32).reshape(blocks, BLOCK)
    quants, scales = np.empty((rows, columns), np.int8), np.empty((rows, blocks), np.float16)
    step = max(1, AT_ONCE // columns)
    for at in range(0, rows, step):
        part = slice(at, min(rows, at + step))
        wide = dequantize(plain, part).reshape(-1, blocks, BLOCK)
        least = np.full(wide.shape[:2], np.inf, np.float32)
        best = start_scales[part].copy()
        for factor in CANDIDATES:
            scale = (start_scales[part] * factor).astype(np.float16).astype(np.float32)
            error = np.square(_codes(wide, scale) * scale[..., None] - wide)
            weighed = np.einsum("rbk,bk->rb", error, weigh)
            better = weighed < least
            least, best = np.where(better, weighed, least), np.where(better, scale, best)
        scales[part] = best
        quants[part] = _codes(wide, best).reshape(-1, columns)
    return BlockedArrays(quants, scales)


def _codes(wide: Array, scale: Array) -> Array:
    found: Array = np.clip(np.rint(wide / scale[..., None]), LOW, HIGH)
    return found
