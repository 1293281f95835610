"""Reading weights from built graphs and from opened files, without false positives.

Draws: what is compared must be equal, whatever the numbers are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from transom.graph import Blocked, BlockedArrays, Dense, Graph, GraphBuilder, Weight
from transom.graph.passes import infer_types
from transom.graph.reading import attributes_of, constant_of, element_type, weight_of
from transom.graph.weights import dense, dequantize
from transom.reference.executor import Executor
from transom.testing.models import tiny_decoder


def blocked(
    rng: np.random.Generator, dtype: Any, scale: Any = "float16", minimums: bool = False, zeros: bool = False
) -> Blocked:
    low, high = {"int4": (-8, 8), "uint4": (0, 16), "int8": (-128, 128), "uint8": (0, 256)}[dtype]
    plain = np.uint8 if dtype.startswith("u") else np.int8
    parts = BlockedArrays(
        rng.integers(low, high, (6, 96)).astype(plain),
        rng.random((6, 3)).astype(scale),
        rng.standard_normal((6, 3)).astype(scale) if minimums else None,
        rng.integers(low, high, (6, 3)).astype(plain) if zeros else None,
    )
    return Blocked((6, 96), 32, dtype, scale, lambda: parts, minimums, zeros)


def by_rows(rng: np.random.Generator, dtype: Any, scale: Any) -> Blocked:
    """A weight with one scale per row: all codes of int8, or all 8-bit floats."""
    if dtype == "int8":
        quants = rng.integers(-128, 128, (6, 96)).astype(np.int8)
    else:
        codes = np.array([c for c in range(256) if c & 127 != 127], np.uint8)  # the others are NaN
        quants = rng.permutation(np.resize(codes, 576)).view(ml_dtypes.float8_e4m3fn).reshape(6, 96)
    parts = BlockedArrays(quants, rng.random((6, 1)).astype(scale))
    return Blocked((6, 96), 96, dtype, scale, lambda: parts)


FORMS = [
    (dtype, scale, minimums, zeros)
    for dtype in ("int4", "uint4", "int8", "uint8")
    for scale in ("float16", "float32")
    for minimums in (False, True)
    for zeros in (False, True)
]


def graph_with(weight: Weight) -> tuple[Graph, ir.Value]:
    b = GraphBuilder("weight")
    x = b.input("x", "float32", ["n", weight.shape[-1]])
    y = b.linear(x, weight, "w")
    b.output(y, "y")
    return b.finish(weights_hash="w"), _matrix(b.graph)


def _matrix(graph: ir.Graph) -> ir.Value:
    node = next(n for n in graph if n.op_type == "Transpose")
    assert node.inputs[0] is not None
    return node.inputs[0]


@pytest.mark.parametrize(("dtype", "scale", "minimums", "zeros"), FORMS)
def test_quantized_weight_is_read_back_in_its_form(
    dtype: str, scale: str, minimums: bool, zeros: bool, rng: np.random.Generator, tmp_path: Path
) -> None:
    assert_read_back(blocked(rng, dtype, scale, minimums, zeros), tmp_path)


@pytest.mark.parametrize("scale", ["float16", "float32"])
@pytest.mark.parametrize("dtype", ["int8", "float8e4m3fn"])
def test_weight_with_a_scale_for_each_row_is_read_back_in_its_form_and_runs_elsewhere(
    dtype: str, scale: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    weight = by_rows(rng, dtype, scale)
    assert_read_back(weight, tmp_path)
    graph = infer_types(graph_with(weight)[0])
    graph.check()
    graph.save(tmp_path / "graph.onnx")
    assert Graph.open(tmp_path / "graph.onnx").digest() == graph.digest()
    assert graph_with(by_rows(rng, dtype, scale))[0].digest() != graph_with(weight)[0].digest()
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(tmp_path / "graph.onnx", options, providers=["CPUExecutionProvider"])
    unit = np.eye(96, dtype=np.float32)
    np.testing.assert_array_equal(session.run(None, {"x": unit})[0].T, dequantize(weight))
    np.testing.assert_array_equal(Executor(graph).run({"x": unit})["y"].T, dequantize(weight))


def assert_read_back(weight: Blocked, folder: Path) -> None:
    graph, value = graph_with(weight)
    assert weight_of(value) is weight
    graph.save(folder / "graph.onnx")
    read = weight_of(_matrix(Graph.open(folder / "graph.onnx").model.graph))
    assert isinstance(read, Blocked)
    wanted = (weight.shape, weight.block, weight.dtype, weight.scale_dtype)
    assert (read.shape, read.block, read.dtype, read.scale_dtype) == wanted
    minimums, zeros = weight.has_minimums, weight.has_zero_points
    assert (read.has_minimums, read.has_zero_points) == (minimums, zeros)
    for got, wanted in zip(read.load(), weight.load(), strict=True):
        if wanted is None:
            assert got is None
        else:
            assert got is not None
            assert got.dtype == wanted.dtype
            np.testing.assert_array_equal(got, wanted)
    np.testing.assert_array_equal(dequantize(read), dequantize(weight))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_dense_weight_is_read_back_in_its_element_type(dtype: Any, rng: np.random.Generator, tmp_path: Path) -> None:
    array = rng.standard_normal((40, 16)).astype(dtype)
    graph, value = graph_with(dense(array))
    graph.save(tmp_path / "graph.onnx")
    for found in (value, _matrix(Graph.open(tmp_path / "graph.onnx").model.graph)):
        read = weight_of(found)
        assert isinstance(read, Dense)
        assert read.dtype == np.dtype(dtype).name
        loaded = read.load()
        assert loaded.dtype == array.dtype
        np.testing.assert_array_equal(loaded, array)


def test_weight_before_its_minimums_are_added_has_none(rng: np.random.Generator) -> None:
    weight = blocked(rng, "uint4", minimums=True)
    graph, _ = graph_with(weight)
    dequantized = next(n for n in graph.nodes() if n.op_type == "DequantizeLinear").outputs[0]
    read = weight_of(dequantized)
    assert isinstance(read, Blocked)
    assert not read.has_minimums
    assert read.load().minimums is None
    np.testing.assert_array_equal(read.load().quants, weight.load().quants)


def test_values_that_are_computed_or_changed_are_no_weights(rng: np.random.Generator) -> None:
    b = GraphBuilder("computed")
    x = b.input("x", "float32", ["n", 96])
    w = b.weight(blocked(rng, "int4"), "w")
    d = b.weight(dense(rng.standard_normal((6, 96)).astype(np.float32)), "d")
    assert weight_of(None) is None
    assert weight_of(x) is None
    assert weight_of(b.op("Add", w, x)) is None
    assert weight_of(b.op("Add", w, b.constant(1.0))) is None
    assert weight_of(b.op("Neg", d)) is None
    assert weight_of(b.op("Cast", d, to=int(ir.DataType.INT64))) is None
    assert weight_of(b.op("Cast", d, to=int(ir.DataType.FLOAT16))) is None, "it was rounded on the way"
    assert weight_of(b.op("Identity", d)) is not None
    # blocks reshaped to a different matrix, with an addend per block
    other = b.op("Reshape", w, b.constant([6, 3, 32]))
    shifted = b.op("Add", other, b.weight(dense(np.ones((6, 3, 1), np.float16)), "m"))
    assert weight_of(b.op("Reshape", shifted, b.constant([12, 48]))) is None
    assert isinstance(weight_of(b.op("Reshape", shifted, b.constant([6, 96]))), Blocked)
    wrong = b.op("Add", other, b.weight(dense(np.ones((6, 3, 32), np.float16)), "full"))
    assert weight_of(b.op("Reshape", wrong, b.constant([6, 96]))) is None


def test_dequantized_activations_and_computed_parts_are_no_weights() -> None:
    b = GraphBuilder("activations")
    q, scale, zero = b.input("q", "int8", [6, 96]), b.input("s", "float32", [6, 3]), b.input("z", "int8", [6, 3])
    fixed_q = b._initializer(ir.tensor(np.zeros((6, 96), np.int8), name="quants"))
    fixed_s = b._initializer(ir.tensor(np.ones((6, 3), np.float32), name="scales"))
    blocks = {"axis": 1, "block_size": 32}
    assert weight_of(b.op("DequantizeLinear", q, fixed_s, **blocks)) is None
    assert weight_of(b.op("DequantizeLinear", fixed_q, scale, **blocks)) is None
    assert weight_of(b.op("DequantizeLinear", fixed_q, fixed_s, zero, **blocks)) is None
    assert weight_of(b.op("DequantizeLinear", fixed_q, fixed_s, axis=0, block_size=2)) is None
    found = weight_of(b.op("DequantizeLinear", fixed_q, fixed_s, axis=-1, block_size=32))
    assert isinstance(found, Blocked)


def test_constants_are_seen_as_initializers_and_as_nodes() -> None:
    b = GraphBuilder("constants")
    np.testing.assert_array_equal(constant_of(b.constant([1, 2])), [1, 2])  # type: ignore[arg-type]
    x = b.input("x", "float32", [1])
    assert constant_of(x) is None
    assert constant_of(b.op("Neg", x)) is None
    assert constant_of(None) is None
    for attribute, wanted in (
        (ir.AttrTensor("value", ir.tensor(np.float32([1.5]))), np.float32([1.5])),
        (ir.AttrInt64("value_int", 7), np.int64(7)),
        (ir.AttrInt64s("value_ints", [1, 2]), np.int64([1, 2])),
        (ir.AttrFloat32("value_float", 0.5), np.float32(0.5)),
    ):
        node = ir.Node("", "Constant", [], [attribute], num_outputs=1)
        found = constant_of(node.outputs[0])
        assert found is not None
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(found, wanted)


def test_attributes_come_with_defaults_for_our_operators_and_as_given_for_onnx(rng: np.random.Generator) -> None:
    graph = tiny_decoder(rng, window=5)
    node = next(n for n in graph.nodes() if n.op_type == "CachedAttention")
    del node.attributes["softcap"]
    attributes = attributes_of(node)
    assert attributes["softcap"] == 0.0
    assert attributes["sliding_window"] == 5
    norm = attributes_of(next(n for n in graph.nodes() if n.op_type == "RMSNormalization"))
    assert set(norm) == {"axis", "epsilon"}


def test_element_type_is_known_through_casts_and_dequantization(rng: np.random.Generator, tmp_path: Path) -> None:
    for weight, wanted in (
        (blocked(rng, "uint4", minimums=True), ir.DataType.FLOAT),
        (dense(np.ones((4, 96), np.float16)), ir.DataType.FLOAT),
    ):
        graph, value = graph_with(weight)
        assert element_type(value) == wanted
        graph.save(tmp_path / "graph.onnx")
        assert element_type(_matrix(Graph.open(tmp_path / "graph.onnx").model.graph)) == wanted
    b = GraphBuilder("half")
    quants = b._initializer(ir.tensor(np.zeros((6, 96), np.int8), name="quants"))
    scales = b._initializer(ir.tensor(np.ones((6, 3), np.float16), name="scales"))
    assert element_type(b.op("DequantizeLinear", quants, scales, axis=1, block_size=32)) == ir.DataType.FLOAT16
