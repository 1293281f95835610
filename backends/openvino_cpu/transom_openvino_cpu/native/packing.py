"""Writes weights in the layout that the library reads in place: tiles of 16 rows, with 16 outputs interleaved.

`src/abi.h` defines the layouts. Blocks are kept bit for bit; a zero point that differs between blocks becomes a
minimum.
"""

from __future__ import annotations

from typing import BinaryIO

import ml_dtypes
import numpy as np

from transom.graph.weights import Array, Blocked, Dense, Weight, affine
from transom.quantize import rounding
from transom_openvino_cpu.native.layout import ALIGNMENT, KINDS, TILE, NativeMatrix

CENTERS = {"int4": 8, "int8": 128, "uint4": 0, "uint8": 0}
"""Added to a signed number to make it unsigned."""
GROUP = 64
"""Columns that share a scale when a plain matrix is quantized to int8."""
SMALLEST_BLOCK = 8
"""Columns; all block sizes are multiples of it."""


def packable(weight: Weight) -> str:
    """Why the library cannot read such a matrix; empty if it can."""
    if len(weight.shape) != 2:
        return f"a matrix with {len(weight.shape)} axes"
    if isinstance(weight, Blocked) and weight.dtype not in CENTERS:
        return f"a matrix of {weight.dtype}"
    if isinstance(weight, Blocked) and (weight.block % SMALLEST_BLOCK or weight.shape[1] % weight.block):
        return f"blocks of {weight.block} columns"
    return ""


def align(file: BinaryIO) -> int:
    """Pad the file to a multiple of `ALIGNMENT`, and return that offset."""
    file.write(bytes(-file.tell() % ALIGNMENT))
    return file.tell()


def write_vector(file: BinaryIO, vector: Array) -> int:
    """Append a float32 vector, padded to whole tiles, and return its offset."""
    at = align(file)
    file.write(np.asarray(vector, "<f4").tobytes())
    align(file)
    return at


def group_of(columns: int) -> int:
    """Columns that share a scale when a plain matrix of `columns` columns is quantized to int8."""
    return next(g for g in (GROUP, 32, 16, SMALLEST_BLOCK) if columns % g == 0)


def write_matrix(file: BinaryIO, weight: Weight, *, narrow: bool = False, to_int8: bool = False) -> NativeMatrix:
    """Append a matrix to the file.

    Args:
        narrow: round plain numbers to bfloat16.
        to_int8: quantize plain numbers to int8 in groups of `GROUP`, or of the next smaller divisor.
    """
    if isinstance(weight, Dense) and to_int8:
        return _write_blocks(file, rounding.to_int8(weight, group_of(weight.shape[1])))
    if isinstance(weight, Dense):
        return _write_dense(file, weight, narrow=narrow)
    return _write_blocks(file, weight)


def _tiles(array: Array) -> Array:
    """[rows, …] to [tiles, 16, …], with rows padded to whole tiles."""
    missing = -len(array) % TILE
    if missing:
        array = np.concatenate([array, np.zeros((missing, *array.shape[1:]), array.dtype)])
    return array.reshape(-1, TILE, *array.shape[1:])


def _write_dense(file: BinaryIO, weight: Dense, *, narrow: bool) -> NativeMatrix:
    rows, columns = weight.shape
    array = weight.load()
    if narrow and weight.dtype != "bfloat16":
        array = array.astype(ml_dtypes.bfloat16)
    kind = KINDS["bfloat16" if narrow else weight.dtype]
    at = align(file)
    if kind == KINDS["bfloat16"]:
        words = np.asarray(array).view(np.uint16)
        if columns % 2:
            words = np.concatenate([words, np.zeros((rows, 1), np.uint16)], 1)
        pairs = _tiles(words.reshape(rows, -1, 2))
        file.write(np.ascontiguousarray(pairs.transpose(0, 2, 1, 3)).tobytes())
    else:
        file.write(np.ascontiguousarray(_tiles(np.asarray(array)).transpose(0, 2, 1)).tobytes())
    return NativeMatrix(kind, rows, columns, 0, 0, False, False, at)


def _write_blocks(file: BinaryIO, weight: Blocked) -> NativeMatrix:
    parts = weight.load()
    rows, columns = weight.shape
    block, center = weight.block, CENTERS[weight.dtype]
    four = weight.dtype in ("int4", "uint4")
    quants = np.ascontiguousarray(parts.quants).view(np.uint8)
    if center:
        quants = quants + np.uint8(center)
    words = _tiles(quants.view("<u4"))  # of four columns, which stay adjacent
    tiles = len(words)
    scales, minimums, zero = affine(parts, center)
    if four:
        pairs = words.reshape(tiles, TILE, columns // 8, 2).transpose(0, 2, 3, 1)
        packed = np.left_shift(pairs[:, :, 1], np.uint32(4), order="C")
        packed |= pairs[:, :, 0]
    else:
        packed = np.ascontiguousarray(words.transpose(0, 2, 1))
    columns_of: list[Array] = [packed.view(np.uint8).reshape(tiles, columns // block, -1)]
    for part in (scales, minimums):
        if part is not None:
            wide = np.ascontiguousarray(_tiles(part).transpose(0, 2, 1))
            columns_of.append(wide.view(np.uint8).reshape(tiles, columns // block, -1))
    at = align(file)
    file.write(np.concatenate(columns_of, -1).data)
    kind = KINDS["uint4" if four else "uint8"]
    return NativeMatrix(kind, rows, columns, block, zero, minimums is not None, bool(scales.dtype == np.float32), at)
