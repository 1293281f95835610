"""Products with weights in blocks, in Triton's interpreter, against the weights unpacked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from calls import Array

from transom_cuda_triton.kernels.linear import multiply_few, multiply_many


def packed(quants: Array, bits: int, block: int) -> Array:
    """As the kernels take them."""
    if bits == 8:
        return quants.astype(np.uint8)
    halves = quants.reshape(len(quants), -1, 2, block // 2)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).astype(np.uint8).reshape(len(quants), -1)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("offset", [False, True], ids=["symmetric", "offsets"])
@pytest.mark.parametrize("rows", [1, 3, 33])
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
            *tensors, many, rows, outputs, columns, columns, outputs, ROWS=16, OUTPUTS=32, WIDTH=width, **form
        )
        multiply_few[(rows, grid[1])](
            *tensors, few, outputs, columns, columns, outputs, OUTPUTS=32, WIDTH=width, **form
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
        outputs, columns, columns, outputs, BITS=4, BLOCK=block, OFFSET=False, ZERO=8, ROWS=16, OUTPUTS=32, WIDTH=32,
    )  # fmt: skip
    wanted = x.astype(np.float64) @ weights.astype(np.float64).T
    np.testing.assert_allclose(out.numpy(), wanted, atol=2e-5 * columns**0.5)
