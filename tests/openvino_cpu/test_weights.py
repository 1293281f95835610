"""Weights as constants: every stored form gives the numbers that the neutral graph means.

Draws: sums over the columns in float32 stay within 3e-6 by many times; codes are off by half a step.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from transom.graph import Blocked, BlockedArrays, Weight
from transom.graph.weights import dense, dequantize
from transom_openvino_cpu.precision import ProductForm
from transom_openvino_cpu.weights import matrix, rows_of

Array = np.ndarray[Any, np.dtype[Any]]
ROWS, COLUMNS = 24, 128
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
RANGES = {"int4": (-8, 8), "uint4": (0, 16), "int8": (-128, 128), "uint8": (0, 256)}


def blocked(rng: np.random.Generator, dtype: Any, block: int, *, minimums: bool, zero_points: bool) -> Blocked:
    low, high = RANGES[dtype]
    plain: Any = np.uint8 if dtype.startswith("u") else np.int8
    blocks = (ROWS, COLUMNS // block)
    parts = BlockedArrays(
        rng.integers(low, high, (ROWS, COLUMNS)).astype(plain),
        (rng.random(blocks) / 50 + 0.001).astype(np.float16),
        rng.standard_normal(blocks).astype(np.float16) if minimums else None,
        rng.integers(low, high, blocks).astype(plain) if zero_points else None,
    )
    return Blocked((ROWS, COLUMNS), block, dtype, "float16", lambda: parts, minimums, zero_points)


def product(weight: Weight, form: ProductForm, x: Array, *, exact: bool = True) -> Array:
    import openvino as ov
    from openvino import opset13 as op

    parameter = op.parameter([-1, COLUMNS], np.float32)
    result = op.matmul(parameter, matrix(weight, form, exact=exact), False, True)
    model = ov.Model([op.result(result)], [parameter])
    compiled = ov.Core().compile_model(model, "CPU", EXACT)
    return np.array(compiled([x])[0])


def error(got: Array, wanted: Array) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("block", [16, 32, 128])
@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("minimums", [False, True])
@pytest.mark.parametrize("dtype", list(RANGES))
def test_stored_blocks_are_exact(
    dtype: str, minimums: bool, zero_points: bool, block: int, rng: np.random.Generator
) -> None:
    weight = blocked(rng, dtype, block, minimums=minimums, zero_points=zero_points)
    x = rng.standard_normal((5, COLUMNS)).astype(np.float32)
    assert error(product(weight, ProductForm("stored", block), x), x @ dequantize(weight).T) < 3e-6


def test_a_block_without_a_scale_keeps_its_minimum(rng: np.random.Generator) -> None:
    whole = blocked(rng, "uint4", 32, minimums=True, zero_points=False)
    parts = whole.load()
    parts.scales[::3] = 0
    x = rng.standard_normal((5, COLUMNS)).astype(np.float32)
    assert error(product(whole, ProductForm("stored", 32), x), x @ dequantize(whole).T) < 3e-6


def test_tiny_scales_beside_minimums_do_not_overflow_half_precision(rng: np.random.Generator) -> None:
    whole = blocked(rng, "uint4", 32, minimums=True, zero_points=False)
    whole.load().scales[...] = np.float16(6e-8)
    x = rng.standard_normal((5, COLUMNS)).astype(np.float32)
    assert error(product(whole, ProductForm("stored", 32), x, exact=False), x @ dequantize(whole).T) < 1e-3


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_plain_matrices_are_exact(dtype: Any, rng: np.random.Generator) -> None:
    weight = dense(rng.standard_normal((ROWS, COLUMNS)).astype(dtype))
    x = rng.standard_normal((5, COLUMNS)).astype(np.float32)
    assert error(product(weight, ProductForm("stored", 0), x), x @ dequantize(weight).T) < 3e-6


@pytest.mark.parametrize("group", [32, 64, 128])
def test_rounding_to_int8_costs_half_a_step_at_most(group: int, rng: np.random.Generator) -> None:
    weight = blocked(rng, "uint4", 32, minimums=True, zero_points=False)
    wide = dequantize(weight)
    got = product(weight, ProductForm("int8", group), np.eye(COLUMNS, dtype=np.float32)).T
    step = np.abs(wide.reshape(ROWS, -1, group)).max(-1).repeat(group, -1) / 127
    assert (np.abs(got - wide) <= step * 0.51 + np.abs(wide) * 1e-3).all()  # float16 scales round a little, too


@pytest.mark.parametrize("dtype", [*RANGES, np.float32, np.float16, ml_dtypes.bfloat16])
def test_rows_of_an_embedding_are_exact(dtype: Any, rng: np.random.Generator) -> None:
    import openvino as ov
    from openvino import opset13 as op

    if isinstance(dtype, str):
        unsigned = dtype.startswith("u")
        weight: Weight = blocked(rng, dtype, 32, minimums=unsigned, zero_points=not unsigned)
    else:
        weight = dense(rng.standard_normal((ROWS, COLUMNS)).astype(dtype))
    ids = op.parameter([-1], np.int64)
    compiled = ov.Core().compile_model(
        ov.Model([op.result(rows_of(weight, ids.output(0)))], [ids]), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    chosen = rng.integers(0, ROWS, 9)
    np.testing.assert_allclose(compiled([chosen])[0], dequantize(weight)[chosen], rtol=1e-6, atol=1e-6)
