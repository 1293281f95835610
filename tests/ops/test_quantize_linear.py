"""Rounding to integers and small floats: against ONNX Runtime, where it supports the type, and ml_dtypes.

Draws: what is compared must be equal, whatever the numbers are.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from transom.ops import find, quantize_linear

Array = np.ndarray[Any, np.dtype[Any]]
FLOAT8 = {
    "FLOAT8E4M3FN": ml_dtypes.float8_e4m3fn,
    "FLOAT8E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "FLOAT8E5M2": ml_dtypes.float8_e5m2,
    "FLOAT8E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
}


def reference(x: Array, scale: Array, zero: Array | None = None, **attributes: Any) -> Array:
    schema = find("", "QuantizeLinear")
    assert schema is not None
    (codes,) = schema.reference([x, scale] if zero is None else [x, scale, zero], attributes)
    return codes


def onnx_runtime(x: Array, scale: Array, kind: int, **attributes: Any) -> Array:
    """The values rounded to the type, as float32."""
    ends = {"axis": attributes.get("axis", 1), "block_size": attributes.get("block_size", 0)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s"], ["q"], output_dtype=kind, **attributes),
        helper.make_node("DequantizeLinear", ["q", "one"], ["y"], **ends),
    ]
    graph = helper.make_graph(
        nodes, "rounding", [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, x.shape)],
        [numpy_helper.from_array(scale, "s"), numpy_helper.from_array(np.ones_like(scale), "one")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=12)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def hard_numbers(rng: np.random.Generator, kind: Any) -> Array:
    """Every code, midpoints between codes, numbers of all magnitudes, and NaN."""
    codes = np.arange(256, dtype=np.uint8).view(kind).astype(np.float32)
    codes = np.sort(codes[np.isfinite(codes)])
    special = np.float32([np.nan, np.inf, -np.inf, 1e38, -1e38, 0.0, -0.0, 1e-45])
    anything = rng.standard_normal(500) * 10.0 ** rng.uniform(-8, 8, 500)
    parts = (codes, (codes[1:] + codes[:-1]) / 2, anything.astype(np.float32), special)
    return np.concatenate(parts).astype(np.float32)[None]


@pytest.mark.parametrize("saturate", [1, 0])
@pytest.mark.parametrize("name", FLOAT8)
def test_floats_are_rounded_as_onnx_runtime_rounds_them(name: str, saturate: int, rng: np.random.Generator) -> None:
    x, scale = hard_numbers(rng, FLOAT8[name]), np.array(0.5, np.float32)
    kind = int(getattr(TensorProto, name))
    if not saturate:  # ONNX Runtime 1.32 is wrong between the largest code and where the next would be
        size = np.abs(x[0] / scale)
        x = x[:, ~((size > 448) & (size < 512) | (size > 57344) & (size < 65536))]
    got = reference(x, scale, output_dtype=kind, saturate=saturate)
    assert got.dtype == FLOAT8[name]
    np.testing.assert_array_equal(got.astype(np.float32), onnx_runtime(x, scale, kind, saturate=saturate))


def test_saturation_ends_at_the_largest_code_and_what_is_no_number_stays_none() -> None:
    x = np.float32([1e9, -1e9, np.inf, -np.inf, np.nan, 464.0, 465.0])
    for attributes in ({}, {"saturate": 1}):
        got = reference(x, np.float32(1), np.zeros((), ml_dtypes.float8_e4m3fn), **attributes).astype(np.float32)
        np.testing.assert_array_equal(got, np.float32([448, -448, 448, -448, np.nan, 448, 448]))
    cut = reference(x, np.float32(1), output_dtype=17, saturate=0).astype(np.float32)
    np.testing.assert_array_equal(np.isnan(cut), [True, True, True, True, True, False, True])


@pytest.mark.parametrize("granularity", ["tensor", "axis", "block"])
@pytest.mark.parametrize("name", ["FLOAT8E4M3FN", "INT8", "UINT8", "INT4", "UINT4", "INT16", "UINT16"])
def test_scales_lie_as_onnx_says(name: str, granularity: str, rng: np.random.Generator) -> None:
    x = (rng.standard_normal((6, 64)) * 40).astype(np.float32)
    shape, attributes = {
        "tensor": ((), {}), "axis": ((6,), {"axis": 0}), "block": ((6, 4), {"axis": 1, "block_size": 16}),
    }[granularity]  # fmt: skip
    scale = np.asarray(rng.random(shape) + 0.1, np.float32)
    kind = int(getattr(TensorProto, name))
    got = reference(x, scale, output_dtype=kind, **attributes)
    np.testing.assert_array_equal(got.astype(np.float32), onnx_runtime(x, scale, kind, **attributes))


def test_integers_are_rounded_to_even_and_then_moved_and_cut_off() -> None:
    x = np.float32([0.5, 1.5, 2.5, -0.5, -1.5, 300, -300])
    assert reference(x, np.float32(1), np.int8(0)).tolist() == [0, 2, 2, 0, -2, 127, -128]
    assert reference(x, np.float32(1), np.uint8(7)).tolist() == [7, 9, 9, 7, 5, 255, 0]
    assert reference(x, np.float32(1)).dtype == np.uint8


def test_division_is_in_the_type_of_the_scale_or_in_the_one_that_is_named() -> None:
    x, scale = np.float32([2049 / 2]), np.float16(1)
    assert reference(x, scale, np.int16(0)).tolist() == [1024]
    assert reference(np.float32([2049]), scale, np.int16(0)).tolist() == [2048], "float16 has no 2049"
    assert reference(np.float32([2049]), scale, np.int16(0), precision=1).tolist() == [2049]


@pytest.mark.seeds(1953625005)
def test_no_quotient_of_a_sample_is_the_middle_of_two_codes(rng: np.random.Generator) -> None:
    """There an engine may give either code."""
    for sample in quantize_linear.samples(rng):
        x, scale = (np.asarray(array, np.float64) for array in sample.inputs[:2])
        assert np.abs(x / scale % 1 - 0.5).min() > 0.009, sample.name
