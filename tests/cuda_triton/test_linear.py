"""Products with weights in blocks and in float8, in Triton's interpreter, against the weights unpacked.

Draws: bounds are those of sums in float32 over the columns, and of half a step of each form.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from calls import Array, packed

from transom.graph.weights import dense
from transom.quantize.rounding import to_float8
from transom_cuda_triton.kernels.linear import (
    multiply_few,
    multiply_few_float8,
    multiply_many,
    multiply_many_float8,
    quantize_rows,
)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("offset", [False, True], ids=["symmetric", "offsets"])
@pytest.mark.parametrize("rows", [1, 3, 33])
@pytest.mark.sweep(
    only=(
        "33-symmetric-32-4",
        "33-symmetric-32-8",
        "33-symmetric-64-4",
        "33-symmetric-128-4",
        "33-symmetric-64-8",
        "33-offsets-64-4",
        "33-offsets-64-8",
        "33-offsets-128-4",
        "33-offsets-128-8",
        "33-offsets-32-8",
        "33-symmetric-128-8",
    )
)
def test_products_are_those_of_the_unpacked_weights(
    bits: int, block: int, offset: bool, rows: int, rng: np.random.Generator
) -> None:
    outputs, columns = int(rng.integers(1, 90)), block * int(rng.integers(1, 6))
    quants = rng.integers(0, 1 << bits, (outputs, columns))
    shape, zero = (outputs, columns // block), 1 << bits - 1
    scales = (rng.uniform(0.5, 1.5, shape) / zero).astype(np.float16)
    offsets = rng.standard_normal(shape).astype(np.float16)
    spread = scales.astype(np.float64).repeat(block, 1)
    weights = quants * spread + offsets.repeat(block, 1) if offset else (quants - zero) * spread
    x = rng.standard_normal((rows, columns)).astype(np.float32)
    wanted = x @ weights.T
    bound = 1e-6 * (np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(weights, axis=1)) * columns**0.5
    tensors = [torch.from_numpy(a) for a in (x, packed(quants, bits, block), scales, offsets)]
    form = {"BITS": bits, "BLOCK": block, "OFFSET": offset, "ZERO": zero}
    for width in (16, 64):
        few, many = (torch.full((rows, outputs), float("nan")) for _ in range(2))
        grid = (-(-rows // 16), -(-outputs // 32))
        multiply_many[grid](
            *tensors, many, rows, outputs, columns // block, columns, outputs, ROWS=16, OUTPUTS=32, WIDTH=width, **form
        )
        multiply_few[(rows, grid[1])](
            *tensors, few, outputs, columns // block, columns, outputs, OUTPUTS=32, WIDTH=width, **form
        )
        for got in (few, many):
            assert (np.abs(got.numpy() - wanted) <= bound).all()


def test_float16_is_rounded_once(rng: np.random.Generator) -> None:
    """Weights are rounded to the activations' form for the tensor cores, and sums are not."""
    outputs, columns, block = 40, 512, 64
    quants = rng.integers(0, 16, (outputs, columns))
    scales = (rng.uniform(0.5, 1.5, (outputs, columns // block)) / 8).astype(np.float16)
    x = rng.standard_normal((5, columns)).astype(np.float16)
    weights = ((quants - 8) * scales.astype(np.float32).repeat(block, 1)).astype(np.float16)
    out = torch.empty((5, outputs), dtype=torch.float32)
    multiply_many[(1, 2)](
        torch.from_numpy(x), torch.from_numpy(packed(quants, 4, block)), torch.from_numpy(scales), None, out, 5,
        outputs, columns // block, columns, outputs, BITS=4, BLOCK=block, OFFSET=False, ZERO=8, ROWS=16, OUTPUTS=32,
        WIDTH=32,
    )  # fmt: skip
    wanted = x.astype(np.float64) @ weights.astype(np.float64).T
    np.testing.assert_allclose(out.numpy(), wanted, atol=2e-5 * columns**0.5)


# float8 ---------------------------------------------------------------------------------------------------------------
FLOAT8 = ml_dtypes.float8_e4m3fn


def rounded(x: Array) -> tuple[Array, Array]:
    """Rows as `quantize_rows` has them: codes in E4M3, and scales."""
    most = np.maximum(np.abs(x).max(1), np.float32(1e-30))
    return (x * (np.float32(448) / most)[:, None]).astype(FLOAT8), most / np.float32(448)


def as_tensor(codes: Array) -> torch.Tensor:
    return torch.from_numpy(codes.view(np.uint8)).view(torch.float8_e4m3fn)


@triton.jit
def widen(CODES, OUT, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    tl.store(OUT + i, tl.load(CODES + i).to(tl.float32))


def test_every_code_that_is_a_number_is_widened_as_it_should_be() -> None:
    """Triton's interpreter takes the two that are none for 480; no matrix and no activation is ever rounded to them."""
    codes = np.arange(256, dtype=np.uint8).view(FLOAT8)
    out, wanted = torch.empty(256), codes.astype(np.float32)
    widen[(1,)](as_tensor(codes), out, COUNT=256)
    numbers = np.isfinite(wanted)
    assert numbers.sum() == 254
    np.testing.assert_array_equal(out.numpy()[numbers], wanted[numbers])


def test_activations_are_rounded_as_ml_dtypes_rounds(rng: np.random.Generator) -> None:
    """All codes, what lies half way between two of them, and numbers of any size; but zeros lose their sign."""
    codes = np.arange(256, dtype=np.uint8).view(FLOAT8).astype(np.float32)
    codes = np.sort(codes[np.isfinite(codes)])
    x = np.zeros((6, 1040), np.float32)
    x[0, : len(codes)], x[1, : len(codes)], x[1, -1] = codes, (codes + np.roll(codes, 1)) / 2, 448
    x[2] = rng.standard_normal(1040) * 10.0 ** rng.uniform(-6, 3, 1040)
    x[3] = 1e30 * rng.standard_normal(1040)
    x[4, 7] = 1e-38
    out, scales = as_tensor(np.full(x.shape, 99, np.uint8)), torch.empty(len(x))
    quantize_rows[(len(x),)](torch.from_numpy(x), out, scales, 1040 // 16, 1040, 1040, WIDTH=1024)
    wanted, wanted_scales = rounded(x)
    got = out.view(torch.uint8).numpy().view(FLOAT8)
    np.testing.assert_array_equal(got.astype(np.float32), wanted.astype(np.float32))
    np.testing.assert_allclose(scales.numpy(), wanted_scales, rtol=1e-7)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_none_in_the_end(wrong: float, rng: np.random.Generator) -> None:
    x = rng.standard_normal((3, 64)).astype(np.float32)
    x[1, 5] = wrong
    codes, scales = as_tensor(np.zeros(x.shape, np.uint8)), torch.empty(3)
    quantize_rows[(3,)](torch.from_numpy(x), codes, scales, 4, 64, 64, WIDTH=32)
    assert np.isnan(scales.numpy()).tolist() == [False, True, False]
    assert not (codes.view(torch.uint8).numpy()[1] & 127).any()
    quants, row_scales, *_ = to_float8(dense(x)).load()
    assert np.isnan(row_scales[:, 0]).tolist() == [False, True, False]
    assert np.isfinite(quants.astype(np.float32)).all()


@pytest.mark.parametrize("rows", [1, 3, 37])
@pytest.mark.parametrize("columns", [16, 144, 1040])
@pytest.mark.parametrize("number", [np.float32, np.float16], ids=["fp32", "fp16"])
@pytest.mark.sweep(only=("fp16-1040-37", "fp32-144-37", "fp16-16-37"))  # interpreted
def test_products_in_float8(rows: int, columns: int, number: type, rng: np.random.Generator) -> None:
    """Exactly those of the rounded numbers, but for the order of sums."""
    outputs = int(rng.integers(1, 90))
    weights = (rng.standard_normal((outputs, columns)) * 10.0 ** rng.uniform(-3, 1, (outputs, 1))).astype(np.float32)
    weights[-1] = 0
    parts = to_float8(dense(weights)).load()
    quants, scales = parts.quants, parts.scales[:, 0]
    assert np.abs(quants.astype(np.float32)[:-1]).max(1).tolist() == [448] * (outputs - 1)
    wide = quants.astype(np.float64) * scales[:, None]
    assert (np.abs(wide - weights) <= 2.0**-4 * np.abs(weights) + 2.0**-10 * scales[:, None]).all()
    x = (rng.standard_normal((rows, columns)) * 10.0 ** rng.uniform(-1, 1, (rows, 1))).astype(number)
    given, matrix = torch.from_numpy(x), (as_tensor(quants), torch.from_numpy(scales))
    few, many = (torch.full((rows, outputs), float("nan")) for _ in range(2))
    blocks = columns // 16
    grid = rows, -(-outputs // 32)
    multiply_few_float8[grid](given, *matrix, few, outputs, blocks, columns, outputs, OUTPUTS=32, WIDTH=128)
    codes, row_scales = as_tensor(np.zeros(x.shape, np.uint8)), torch.empty(rows)
    quantize_rows[(rows,)](given, codes, row_scales, blocks, columns, columns, WIDTH=256)
    multiply_many_float8[-(-rows // 16), grid[1]](
        codes, row_scales, *matrix, many, rows, outputs, blocks, columns, outputs, ROWS=16, OUTPUTS=32, WIDTH=64
    )
    numbers, sizes = rounded(x.astype(np.float32))
    met = numbers.astype(np.float64) * sizes[:, None]
    for got, left in ((few, x.astype(np.float64)), (many, met)):
        bound = 1e-6 * columns**0.5 * np.linalg.norm(left, axis=1)[:, None] * np.linalg.norm(wide, axis=1)
        assert (np.abs(got.numpy() - left @ wide.T) <= bound).all()
