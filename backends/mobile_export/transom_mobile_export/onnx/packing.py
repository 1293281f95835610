"""Quantized matrices in the layout of ONNX Runtime's `MatMulNBits` and `GatherBlockQuantized`.

    w[n, k] = scale[n, b] * (code[n, k] - zero_point[n, b]),  b = k // block

with unsigned codes of 4 or 8 bits, and blocks of 16, 32, 64, 128 or 256 columns. Every integer form of a checkpoint is
written in it without loss: larger blocks are split, 8 or 128 is added to signed codes, and minimums, which the layout
lacks, become a small matrix that multiplies the sums of each block's inputs,

    sum_k x_k (s (q_k - z) + m) = sum_k x_k s (q_k - c) + (sum_k x_k) (m + s (c - z)).

c, 8 or 128, is the default zero point of both operators.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from transom.graph.weights import BITS, Array, Blocked, BlockedArrays, Weight, affine

SMALLEST_BLOCK, LARGEST_BLOCK = 16, 256


def block_of(weight: Weight) -> int:
    """Columns of a block in this layout; 0 if the layout cannot hold the matrix: it is plain, of floats, or in blocks
    that are not a multiple of 16 columns."""
    if not isinstance(weight, Blocked) or weight.dtype == "float8e4m3fn" or weight.shape[1] % weight.block:
        return 0
    block = math.gcd(weight.block, LARGEST_BLOCK)
    return block if block >= SMALLEST_BLOCK else 0


@dataclass(frozen=True)
class PackedBlocks:
    """A matrix [rows, columns] in this layout; there are `columns / block` blocks."""

    bits: int
    block: int
    codes: Array
    """uint8 [rows, blocks, block * bits / 8]; of two 4-bit codes in a byte the first is in the lower half."""
    scales: Array
    """float32 [rows, blocks]."""
    zero_points: Array | None
    """uint8 [rows, blocks of 8 bits or pairs of 4 bits]; None: 8 or 128 everywhere."""
    shifts: Array | None
    """float32 [rows, blocks], added to every number of a block; None: nothing is added."""

    def zero_shifts(self) -> Array | None:
        """What zero points add to every number of a block, float32 [rows, blocks]; None if there are none."""
        if self.zero_points is None:
            return None
        zeros = self.zero_points
        if self.bits == 4:
            zeros = np.stack([zeros & 15, zeros >> 4], -1).reshape(len(zeros), -1)[:, : self.scales.shape[1]]
        shifts: Array = self.scales * (np.float32(1 << (self.bits - 1)) - zeros.astype(np.float32))
        return shifts


def pack(weight: Blocked) -> PackedBlocks:
    """Read a matrix for which `block_of` is not 0, and pack it."""
    block, bits = block_of(weight), BITS[weight.dtype]
    center = 1 << (bits - 1)
    signed = weight.dtype in ("int4", "int8")
    rows, columns = weight.shape
    parts = weight.load()
    cut = weight.block // block

    def each(part: Array) -> Array:
        """Repeat the entry of each stored block for the smaller blocks that it is split into."""
        return part if cut == 1 else np.repeat(part, cut, axis=1)

    scales = each(parts.scales.astype(np.float32))
    zeros = shifts = None
    if weight.has_minimums:
        shifts = each(_shifts(parts, center if signed else 0, center))
    elif parts.zero_points is not None or not signed:
        stored = np.zeros(parts.scales.shape, np.uint8) if parts.zero_points is None else parts.zero_points
        zeros = _in_bytes(each(_unsigned(stored, center if signed else 0)), bits)
    codes = _in_bytes(_unsigned(parts.quants, center if signed else 0), bits)
    codes = codes.reshape(rows, columns // block, block * bits // 8)
    return PackedBlocks(bits, block, codes, np.ascontiguousarray(scales), zeros, shifts)


def _unsigned(codes: Array, added: int) -> Array:
    """int8 or uint8 codes plus the offset that makes them uint8, without a wider copy: sums wrap around as intended."""
    return codes.view(np.uint8) + np.uint8(added)


def _shifts(parts: BlockedArrays, added: int, center: int) -> Array:
    """What is missing if codes are read as distances from the center: float32, for each stored block."""
    scales, minimums, zero = affine(parts, added)
    shift: Array = np.float32(center - zero) * scales.astype(np.float32)
    return shift if minimums is None else shift + minimums.astype(np.float32)


def _in_bytes(codes: Array, bits: int) -> Array:
    """uint8 codes [rows, count], packed two to a byte if they have 4 bits; an odd last one is padded with 0."""
    if bits == 8:
        return np.ascontiguousarray(codes)
    if codes.shape[1] % 2:
        codes = np.pad(codes, ((0, 0), (0, 1)))
    return np.ascontiguousarray(codes[:, 0::2] | (codes[:, 1::2] << 4))
