"""Matrices in the layout of `MatMulNBits` and `GatherBlockQuantized` stand for what they stood for before.

Draws: float32 sums in another order differ by about 1e-6 of their size; the tolerances are ten times that or more.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from transom.graph.weights import Blocked, BlockedArrays, BlockedDtype, dense, dequantize
from transom.quantize.rounding import to_float8, to_int8
from transom_mobile_export.onnx.packing import PackedBlocks, block_of, pack

Array = np.ndarray[Any, np.dtype[Any]]
RANGES: dict[BlockedDtype, tuple[int, int]] = {
    "int4": (-8, 8), "uint4": (0, 16), "int8": (-128, 128), "uint8": (0, 256),
}  # fmt: skip


def blocked(
    rng: np.random.Generator, dtype: BlockedDtype, block: int, blocks: int, *, minimums: bool, zeros: bool
) -> Blocked:
    low, high = RANGES[dtype]
    stored: Any = np.int8 if low else np.uint8
    shape = (7, block * blocks)
    scales = rng.uniform(0.1, 2, (7, blocks)).astype(np.float16)
    parts = BlockedArrays(
        rng.integers(low, high, shape).astype(stored), scales,
        rng.standard_normal((7, blocks)).astype(np.float16) if minimums else None,
        rng.integers(low, high, (7, blocks)).astype(stored) if zeros else None,
    )  # fmt: skip
    return Blocked(shape, block, dtype, "float16", lambda: parts, minimums, zeros)


def unpacked(packed: PackedBlocks) -> Array:
    """float32 [rows, columns], as the operators' documentation has it."""
    rows, blocks, _ = packed.codes.shape

    def each(part: Array, count: int) -> Array:
        flat = part.reshape(rows, -1)
        if packed.bits == 4:
            flat = np.stack([flat & 15, flat >> 4], -1).reshape(rows, -1)
        return flat[:, :count].astype(np.float32)

    codes = each(packed.codes, blocks * packed.block).reshape(rows, blocks, packed.block)
    centre = np.float32(1 << (packed.bits - 1))
    zeros = centre if packed.zero_points is None else each(packed.zero_points, blocks)[..., None]
    found = packed.scales[..., None] * (codes - zeros)
    if packed.shifts is not None:
        found = found + packed.shifts[..., None]
    return np.asarray(found.reshape(rows, -1), np.float32)


@pytest.mark.parametrize("dtype", RANGES)
@pytest.mark.parametrize(("minimums", "zeros"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(("block", "blocks"), [(16, 3), (32, 2), (96, 1), (576, 2), (1024, 1)])
def test_every_integer_form_is_written_without_loss(
    dtype: BlockedDtype, minimums: bool, zeros: bool, block: int, blocks: int, rng: np.random.Generator
) -> None:
    weight = blocked(rng, dtype, block, blocks, minimums=minimums, zeros=zeros)
    packed = pack(weight)
    assert packed.block == block_of(weight)
    assert packed.block in (16, 32, 64, 128, 256)
    assert packed.codes.dtype == np.uint8
    assert packed.codes.shape == (7, block * blocks // packed.block, packed.block * packed.bits // 8)
    wanted = dequantize(weight)
    assert np.abs(unpacked(packed) - wanted).max() <= 1e-6 * np.abs(wanted).max()
    if packed.zero_points is not None:
        shifted = unpacked(replace(packed, zero_points=None, shifts=packed.zero_shifts()))
        assert np.abs(shifted - wanted).max() <= 1e-6 * np.abs(wanted).max()


def test_what_has_no_form_is_told(rng: np.random.Generator) -> None:
    plain = dense(rng.standard_normal((8, 48)).astype(np.float32))
    assert block_of(plain) == 0
    assert block_of(to_float8(plain)) == 0
    assert block_of(blocked(rng, "int4", 8, 4, minimums=False, zeros=False)) == 0
    assert block_of(blocked(rng, "int4", 24, 4, minimums=False, zeros=False)) == 0  # no 16 columns divide 24
    assert block_of(to_int8(plain, 16)) == 16
    assert block_of(to_int8(plain)) == 16  # a scale for each row of 48
