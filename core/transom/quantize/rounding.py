"""Quantizes one matrix, round to nearest, into forms that engines multiply: 4- and 8-bit blocks, 8-bit floats by rows.

Nothing is read or quantized until `load` of the result is called. It then works on some rows at a time, to use little
memory besides the result. All forms are symmetric: a code stands for `scale * code`, and scales are positive.

NaN and infinity have no code. Their block gets a NaN scale and codes of 0, so that the whole block is NaN and the error
shows in every result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from transom.errors import OptionError
from transom.graph.weights import (
    DENSE_DTYPES,
    FLOAT8,
    UNPACKED,
    Array,
    Blocked,
    BlockedArrays,
    BlockedDtype,
    Weight,
    dequantize,
)

BLOCKS = (32, 64, 128)
"""Columns that share a scale in the 4-bit form."""
LARGEST_FLOAT8 = 448.0
"""The largest number of E4M3."""
ScaleDtype = Literal["float16", "float32"]

_CHUNK = 1 << 22
"""Number of elements that are quantized at a time: 16 MB of float32."""
_Steps = Callable[[Array], Array]
"""Blocks [..., block] float32 -> the ideal step of each block [...] float32; non-finite for non-finite blocks."""


def to_int4(weight: Weight, block: int = 32) -> Blocked:
    """A matrix in the 4-bit form: INT4 with a float16 scale per `block` columns.

    The codes -8 to 7 are asymmetric around 0. The scale is the smallest for which every element is within half a step
    of a code: `max(largest / 7.5, -smallest / 8.5)`. For normally distributed weights, the error is 7 % (blocks of 32)
    to 10 % (blocks of 128) below that of the codes -7 to 7 with the scale `largest magnitude / 7`.

    Args:
        weight: [N, K], plain or in other blocks.
        block: 32, 64 or 128; must divide K.

    Raises:
        OptionError: the weight is not a matrix, or the blocks do not fit. `load` raises it if a number is too large.
    """
    if block not in BLOCKS:
        raise OptionError(f"4-bit weights come in blocks of 32, 64 or 128 columns, not of {block}", "Use block=32")
    return _quantized(weight, block, "int4", "float16", _asymmetric_steps, (-8, 7))


def to_int8(weight: Weight, block: int | None = None) -> Blocked:
    """A matrix in INT8 with codes -127 to 127 and a float16 scale per `block` columns: `largest magnitude / 127`.

    Args:
        weight: [N, K], plain or in other blocks.
        block: must divide K; None: one scale per row.

    Raises:
        OptionError: the weight is not a matrix, or the blocks do not fit. `load` raises it if a number is too large.
    """
    return _quantized(weight, block, "int8", "float16", lambda wide: _largest(wide) / np.float32(127), (-127, 127))


def to_float8(weight: Weight, scale_dtype: ScaleDtype = "float32") -> Blocked:
    """A matrix in E4M3 with one scale per row, such that the largest code of the row is 448.

    Args:
        weight: [N, K], plain or in blocks.

    Raises:
        OptionError: the weight is not a matrix. `load` raises it if a number is too large for a float16 scale.
    """
    largest = np.float32(LARGEST_FLOAT8)
    return _quantized(weight, None, "float8e4m3fn", scale_dtype, lambda wide: _largest(wide) / largest, (-448, 448))


def _asymmetric_steps(wide: Array) -> Array:
    steps: Array = np.maximum(wide.max(-1) / np.float32(7.5), wide.min(-1) / np.float32(-8.5))
    return steps


def _largest(wide: Array) -> Array:
    largest: Array = np.abs(wide).max(-1)
    return largest


def _quantized(
    weight: Weight,
    block: int | None,
    dtype: BlockedDtype,
    scale_dtype: ScaleDtype,
    steps: _Steps,
    limits: tuple[int, int],
) -> Blocked:
    if len(weight.shape) != 2 or not weight.shape[1]:
        raise OptionError(f"A weight of shape {list(weight.shape)} is not a matrix, and only matrices can be quantized")
    rows, columns = weight.shape
    block = block or columns
    if block < 1 or columns % block:
        raise OptionError(
            f"Blocks of {block} columns do not fit into the {columns} columns of a matrix",
            f"Choose a block that divides {columns}, or keep this matrix unquantized",
        )

    def load() -> BlockedArrays:
        given: Any = weight
        held = given.load()
        whole: Weight = replace(given, load=lambda: held)
        quants = np.empty((rows, columns), UNPACKED[dtype])
        scales = np.empty((rows, columns // block), DENSE_DTYPES[scale_dtype])
        count = max(1, _CHUNK // columns)
        for at in range(0, rows, count):
            part = slice(at, at + count)
            wide = dequantize(whole, part).reshape(-1, columns // block, block)
            found, codes = _codes(wide, scales.dtype, steps, limits, whole_numbers=quants.dtype != FLOAT8)
            scales[part], quants[part] = found, codes.reshape(-1, columns).astype(quants.dtype)
        return BlockedArrays(quants, scales)

    return Blocked((rows, columns), block, dtype, scale_dtype, load)


def _codes(
    wide: Array, scale_dtype: Any, steps: _Steps, limits: tuple[int, int], *, whole_numbers: bool
) -> tuple[Array, Array]:
    """Scales [rows, blocks] and float32 codes [rows, blocks, block] of float32 blocks [rows, blocks, block].

    A scale is never below the smallest normal number of its type, since engines may flush smaller ones to 0.
    """
    info = np.finfo(scale_dtype)
    wanted = steps(wide)
    finite = np.asarray(np.isfinite(wide).all(-1))
    if (too_large := finite & (wanted > float(info.max))).any():
        largest = float(np.abs(wide[too_large]).max())
        raise OptionError(
            f"A weight of {largest:.3g} is too large for quantization with {scale_dtype} scales",
            "Keep this matrix unquantized, or quantize it to float8 with float32 scales",
        )
    scales = np.maximum(np.where(finite, wanted, 1), info.tiny).astype(scale_dtype)
    codes = np.where(finite[..., None], wide, np.float32(0)) / scales[..., None].astype(np.float32)
    if whole_numbers:
        np.rint(codes, out=codes)
    np.clip(codes, *limits, out=codes)
    return np.where(finite, scales, scales.dtype.type("nan")), codes
