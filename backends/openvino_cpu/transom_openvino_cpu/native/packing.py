"""Writes weights in the layout that the library reads in place: tiles of 16 rows, with 16 outputs interleaved.

`src/abi.h` defines the layouts. Blocks are kept number for number, in as many bits as the quants of a matrix need; a
zero point that differs between blocks becomes a minimum. Scales of two levels stay in two levels.
"""

from __future__ import annotations

from typing import BinaryIO

import ml_dtypes
import numpy as np

from transom.graph.weights import BITS, Array, Blocked, BlockedArrays, Dense, ScaleLevels, Weight, affine
from transom.quantize import rounding
from transom_openvino_cpu.native.layout import ALIGNMENT, KINDS, TILE, NativeMatrix

BLOCKED = ("int4", "uint4", "int8", "uint8")
"""Types of quants."""
GROUP = 64
"""Columns that share a scale when a plain matrix is quantized to int8."""
SMALLEST_BLOCK = 8
"""Columns; all block sizes are multiples of it."""


def packable(weight: Weight) -> str:
    """Why the library cannot read such a matrix; empty if it can."""
    if len(weight.shape) != 2:
        return f"a matrix with {len(weight.shape)} axes"
    if isinstance(weight, Blocked) and weight.dtype not in BLOCKED:
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
    return NativeMatrix(kind, rows, columns, 0, 0, False, False, 0, at)


def bits_of(weight: Blocked, parts: BlockedArrays) -> int:
    """Bits in which the library keeps each quant: 4, 5, 6 or 8, as few as hold all of them and suit the block. GGUF's
    Q5_0 and Q6_K are int8 with quants of 5 and 6 bits."""
    quants, block = parts.quants, weight.block
    stored = BITS[weight.dtype]
    if stored == 4 or parts.zero_points is not None or not quants.size:  # a zero point may need all bits
        return stored
    signed = weight.dtype == "int8"
    low, high = int(quants.min()), int(quants.max())
    in_groups = block % 32 == 0 or (block == 16 and quants.shape[1] % 32 == 0)
    for bits in (4, 5, 6):
        least = -(1 << bits - 1) if signed else 0
        fits = bits == 4 or (in_groups and block % (32 if bits == 5 else 16) == 0)
        if fits and least <= low and high < least + (1 << bits):
            return bits
    return 8


def _write_blocks(file: BinaryIO, weight: Blocked) -> NativeMatrix:
    parts = weight.load()
    rows, columns = weight.shape
    block = weight.block
    bits = bits_of(weight, parts)
    center = 0 if weight.dtype.startswith("u") else 1 << bits - 1  # makes a signed number unsigned
    quants = np.ascontiguousarray(parts.quants).view(np.uint8)
    if center:
        quants = quants + np.uint8(center)
    words = _tiles(quants.view("<u4"))  # of four columns, which stay adjacent
    tiles = len(words)
    scales, minimums, zero = affine(parts, center)
    levels = parts.levels if parts.zero_points is None and superblocks_fit(weight) else None
    if bits == 8:
        packed = [words.transpose(0, 2, 1)]
    else:
        lowest = words if bits == 4 else words & np.uint32(0x0F0F0F0F)
        pairs = lowest.reshape(tiles, TILE, columns // 8, 2).transpose(0, 2, 3, 1)
        packed = [np.left_shift(pairs[:, :, 1], np.uint32(4), order="C")]
        packed[0] |= pairs[:, :, 0]
        if bits > 4:
            packed.append(_planes(words, bits - 4))
    blocks: list[Array] = []
    for piece in packed:
        blocks.append(np.ascontiguousarray(piece).view(np.uint8).reshape(tiles, columns // block, -1))
    at, kind, wide = align(file), KINDS[f"uint{bits}"], bool(scales.dtype == np.float32)
    if levels is None:
        blocks += [_by_columns(part, columns // block) for part in (scales, minimums) if part is not None]
        file.write(np.concatenate(blocks, -1).data)
        return NativeMatrix(kind, rows, columns, block, zero, minimums is not None, wide, 0, at)
    superblocks = columns // weight.outer
    header = [_by_columns(part, superblocks) for part in _level_parts(levels)]
    quants = np.concatenate(blocks, -1).reshape(tiles, superblocks, -1)
    file.write(np.concatenate([*header, quants], -1).data)
    return NativeMatrix(kind, rows, columns, block, zero, minimums is not None, False, weight.outer, at)


def superblocks_fit(weight: Blocked) -> bool:
    """Whether the library can keep the scales of a matrix in two levels: `superblocks_fit` in `src/blocks.inl`."""
    return bool(weight.outer) and weight.outer % (4 * weight.block) == 0


def _by_columns(part: Array, columns: int) -> Array:
    """[rows, columns or a multiple] to bytes [tiles, columns, …], with 16 rows interleaved."""
    turned = np.ascontiguousarray(_tiles(part).transpose(0, 2, 1))
    return turned.view(np.uint8).reshape(len(turned), columns, -1)


def _level_parts(levels: ScaleLevels) -> list[Array]:
    """What comes before the quants of a superblock, in this order."""
    if levels.minimums is None or levels.minimum_codes is None:
        return [levels.scales, np.zeros_like(levels.scales), levels.scale_codes]
    return [levels.scales, levels.minimums, levels.scale_codes, levels.minimum_codes]


def _planes(words: Array, bits: int) -> Array:
    """The bits above the fourth, those of several words in one: uint32 [tiles, columns / columns of a plane, 16].

    Args:
        words: the quants of four columns in one number, uint32 [tiles, 16, columns / 4].
        bits: 1 or 2.
    """
    mask = np.uint32(((1 << bits) - 1) * 0x01010101)
    high = (words >> np.uint32(4) & mask).reshape(len(words), TILE, -1, 8 // bits).transpose(0, 2, 1, 3)
    planes = high[..., 0].copy()
    for v in range(1, 8 // bits):
        planes |= high[..., v] << np.uint32(v * bits)
    return planes
