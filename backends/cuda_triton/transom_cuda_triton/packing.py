"""Writes weights into one file of an artifact, aligned, in the layout that the kernels read.

A plain matrix is [rows, columns] in the number format of the activations. Blocks keep their stored values, bit for bit,
in the layout of `transom_cuda_triton.kernels.linear`. A plain matrix may be quantized to blocks, or to float8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from transom.errors import OptionError, option
from transom.graph.weights import Array, Blocked, Dense, Weight, affine, dequantize
from transom.quantize.rounding import to_float8, to_int8
from transom_cuda_triton.precision import QuantizedType

ALIGNMENT = 256
"""Bytes; the alignment of CUDA's allocations, and more than any load needs."""
SMALLEST_BLOCK = 8
CENTERS = {"int4": 8, "int8": 128, "uint4": 0, "uint8": 0}
"""Added to a signed number to make it unsigned."""
NUMBERS: dict[str, Any] = {
    "fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16),
}  # fmt: skip
GROUPS = (128, 64, 32, 16, SMALLEST_BLOCK)
"""Columns that share a scale when a plain matrix is quantized to int8, best first."""
FLOAT8_COLUMNS = 16
"""The columns of a float8 matrix are a multiple of this, so that its rows are aligned."""


@dataclass(frozen=True)
class TritonMatrix:
    """A matrix; parts are byte offsets in the file of weights, -1 for a part that does not exist."""

    bits: int
    """4 or 8: quants in blocks, or float8; 0: plain."""
    rows: int
    columns: int
    at: int
    """Offset of the plain numbers, or of the quants."""
    block: int = 0
    zero: int = 0
    """Subtracted from quants without offsets."""
    scales: int = -1
    offsets: int = -1
    scale_number: str = "fp16"
    offset_number: str = "fp16"
    float8: bool = False
    """Whether the 8 bits are E4M3, with a float32 scale per row; `block` is then `FLOAT8_COLUMNS`."""


def packable(weight: Weight) -> str:
    """Why the kernels cannot read such a matrix; empty if they can."""
    if len(weight.shape) != 2:
        return f"a matrix with {len(weight.shape)} axes"
    if isinstance(weight, Blocked):
        if weight.dtype not in CENTERS:
            return f"a matrix of {weight.dtype}"
        if weight.block % SMALLEST_BLOCK or weight.block & (weight.block - 1):
            return f"blocks of {weight.block} columns"
        if weight.shape[1] % weight.block:
            return f"blocks of {weight.block} in {weight.shape[1]} columns"
    return ""


def align(file: BinaryIO) -> int:
    """Pad the file to a multiple of `ALIGNMENT`, and return that offset."""
    file.write(bytes(-file.tell() % ALIGNMENT))
    return file.tell()


def write_array(file: BinaryIO, array: Array) -> int:
    """Append an array, and return its offset."""
    at = align(file)
    file.write(np.ascontiguousarray(array).view(np.uint8).data)
    return at


def write_matrix(
    file: BinaryIO, weight: Weight, number: str, *, quantized: QuantizedType = "", name: str = "a matrix"
) -> TritonMatrix:
    """Append a matrix to the file.

    Args:
        number: number format of the activations.
        quantized: type to quantize a plain matrix to, if its columns allow it: see `quantizable`.
        name: of the matrix, for the message.

    Raises:
        OptionError: a weight is too large for float16.
    """
    if isinstance(weight, Dense):
        rows, columns = weight.shape
        if quantized == "int8" and quantizable(weight, quantized):
            return _write_blocks(file, to_int8(weight, _group(columns)))
        if quantized == "fp8" and quantizable(weight, quantized):
            codes, scales, *_ = to_float8(weight).load()
            return TritonMatrix(
                8, rows, columns, write_array(file, codes), FLOAT8_COLUMNS, scales=write_array(file, scales),
                scale_number="fp32", float8=True,
            )  # fmt: skip
        return TritonMatrix(0, rows, columns, write_array(file, narrowed(weight, number, name)))
    return _write_blocks(file, weight)


def quantizable(weight: Weight, quantized: QuantizedType) -> bool:
    """Whether a matrix can be quantized to `quantized`: it is plain, and its columns are a multiple of 8 (int8) or 16
    (float8)."""
    if not quantized or not isinstance(weight, Dense) or len(weight.shape) != 2:
        return False
    columns = weight.shape[1]
    return columns % FLOAT8_COLUMNS == 0 if quantized == "fp8" else _group(columns) > 0


def _group(columns: int) -> int:
    """Columns that share a scale in int8; 0 if no group size divides `columns`."""
    return next((g for g in GROUPS if columns % g == 0), 0)


def narrowed(weight: Dense, number: str, name: str) -> Array:
    """A plain weight in the number format `number`.

    Raises:
        OptionError: a finite weight would become infinite.
    """
    kept = NUMBERS[number]
    array = weight.load()
    if array.dtype == kept:
        return array
    with np.errstate(over="ignore"):
        narrow: Array = dequantize(weight).astype(kept)
    if number == "fp16" and not np.isfinite(narrow).all() and np.isfinite(array.astype(np.float32)).all():
        largest = float(np.abs(array.astype(np.float32)).max())
        raise OptionError(
            f"{name} has weights up to {largest:.4g}, and float16 ends at 65504",
            f"Use {option('precision', 'exact')}, or a card of sm_80 or newer, which has bfloat16",
        )
    return narrow


def _write_blocks(file: BinaryIO, weight: Blocked) -> TritonMatrix:
    parts = weight.load()
    rows, columns = weight.shape
    center = CENTERS[weight.dtype]
    four = weight.dtype in ("int4", "uint4")
    quants: Array = np.ascontiguousarray(parts.quants).view(np.uint8)
    if center:
        quants = quants + np.uint8(center)
    if four:
        halves = quants.reshape(rows, -1, 2, weight.block // 2)
        quants = (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(rows, -1)
    scales, minimums, zero = affine(parts, center)
    if minimums is not None and zero:
        minimums = minimums.astype(np.float32) - zero * scales.astype(np.float32)
    at = write_array(file, quants)
    scales_at = write_array(file, scales)
    offsets_at = -1 if minimums is None else write_array(file, minimums)
    names = {np.dtype(np.float16): "fp16", np.dtype(np.float32): "fp32"}
    offset_number = "fp16" if minimums is None else names[minimums.dtype]
    return TritonMatrix(
        4 if four else 8, rows, columns, at, weight.block, zero, scales_at, offsets_at, names[scales.dtype],
        offset_number,
    )  # fmt: skip
