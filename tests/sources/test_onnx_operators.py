"""Plain ONNX models of assorted operators, old opsets and inner graphs give what onnxruntime gives.

Draws: float32 sums in another order differ by about 1e-6 of their size; the tolerances are ten times that or more.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_models import Writer, adding_loop, runtime, save, value

from transom.errors import UnsupportedError
from transom.reference.executor import Executor
from transom.sources.onnx import OnnxSource

Build = Callable[[Writer], tuple[list[Any], list[Any]]]
INT, BOOL = TensorProto.INT64, TensorProto.BOOL


def assert_like_runtime(model: Any, inputs: dict[str, Any], folder: Path, tolerance: float = 1e-5) -> None:
    wanted = runtime(model).run(None, inputs)
    opened = OnnxSource().open(save(model, folder / "model.onnx"))
    assert opened.graph.decoder is None
    opened.graph.check()
    assert opened.graph.model.graph.opset_imports[""] == 24
    assert opened.graph.model.ir_version <= 12
    got = Executor(opened.graph).run(inputs)
    for output, want in zip(model.graph.output, wanted, strict=True):
        have = got[output.name]
        assert have.shape == want.shape, output.name
        assert have.dtype == want.dtype, output.name
        if want.dtype.kind == "f":
            assert np.allclose(have, want, rtol=tolerance, atol=tolerance), np.abs(have - want).max()
        else:
            assert (have == want).all()


def inputs_for(model: Any, rng: np.random.Generator) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for i in model.graph.input:
        tensor = i.type.tensor_type
        shape = [d.dim_value or 3 for d in tensor.shape.dim]
        if tensor.elem_type == INT:
            made[i.name] = rng.integers(0, 3, shape)
        elif tensor.elem_type == BOOL:
            made[i.name] = np.asarray(rng.random(shape) < 0.5)
        else:
            made[i.name] = rng.standard_normal(shape).astype(np.float32)
    return made


def convolutional(w: Writer) -> tuple[list[Any], list[Any]]:
    x = w.op("Conv", "x", w.random(4, 2, 3, 3), w.random(4), pads=[1, 1, 1, 1])
    scales = [w.constant(np.abs(w.rng.standard_normal(4)).astype(np.float32) + 0.5) for _ in range(4)]
    x = w.op("BatchNormalization", x, *scales, epsilon=1e-3)
    x = w.op("MaxPool", w.op("Relu", x), kernel_shape=[2, 2], strides=[2, 2])
    x = w.op("Flatten", w.op("GlobalAveragePool", x))
    x = w.op("Gemm", x, w.random(5, 4), w.random(5), transB=1, alpha=0.5)
    w.op("LogSoftmax", x, axis=1, outputs=["y"])
    return [value("x", shape=["n", 2, 8, 8])], [value("y", shape=["n", 5])]


def reductions(w: Writer) -> tuple[list[Any], list[Any]]:
    a = w.op("ReduceSum", "x", w.constant([1]), keepdims=0)
    b = w.op("ReduceMax", "x", w.constant([-1]), keepdims=1)
    w.op("ReduceL2", "x", w.constant([0, 2]), keepdims=0, outputs=["l2"])
    top = w.op("TopK", a, w.constant([2]), axis=1, outputs=["best", "places"])
    w.op("ArgMax", "x", axis=1, keepdims=0, outputs=["most"])
    w.op("Sub", b, w.op("ReduceMin", b, w.constant([0]), keepdims=1), outputs=["spread"])
    assert top
    kinds = {"l2": 1, "best": 1, "places": INT, "most": INT, "spread": 1}
    return [value("x", shape=[4, 3, 5])], [value(n, k) for n, k in kinds.items()]


def movement(w: Writer) -> tuple[list[Any], list[Any]]:
    x = w.op("Pad", "x", w.constant([0, 1, 0, 2]), w.constant(np.float32(0.5)))
    x = w.op("Slice", x, w.constant([1]), w.constant([-1]), w.constant([1]))
    parts = w.op("Split", x, w.constant([1, 2]), axis=0, outputs=["top", "bottom"])
    g = w.op("GatherND", x, w.constant(np.asarray([[0, 1], [2, 2]])))
    s = w.op("ScatterND", x, w.constant(np.asarray([[1], [0]])), w.op("Slice", x, w.constant([0]), w.constant([2])))
    e = w.op("ScatterElements", x, w.constant(np.asarray([[0, 1, 2]])), w.constant(np.ones((1, 3), np.float32)), axis=0)
    w.op("Tile", w.op("CumSum", s, w.constant(np.int64(1))), w.constant([1, 2]), outputs=["tiled"])
    w.op("Where", w.op("Greater", e, w.constant(np.float32(0))), e, w.op("Neg", e), outputs=["absolute"])
    w.op(
        "Concat",
        w.op("Unsqueeze", g, w.constant([1])),
        w.op("Unsqueeze", g, w.constant([1])),
        axis=1,
        outputs=["twice"],
    )
    assert parts
    return [value("x", shape=[3, 4])], [value(n) for n in ("top", "bottom", "tiled", "absolute", "twice")]


def sequences_of_math(w: Writer) -> tuple[list[Any], list[Any]]:
    x = w.op("Einsum", "x", w.random(5, 4), equation="bij,jk->bik")
    x = w.op("Erf", w.op("Clip", x, w.constant(np.float32(-1)), w.constant(np.float32(1))))
    x = w.op("Gelu", w.op("Mish", w.op("HardSwish", x)))
    x = w.op("LayerNormalization", x, w.random(4), w.random(4), axis=-1)
    x = w.op("InstanceNormalization", w.op("Transpose", x, perm=[0, 2, 1]), w.random(4), w.random(4))
    w.op("Softplus", w.op("PRelu", x, w.constant(np.float32([0.2]))), outputs=["y"])
    low = w.op("Mod", w.op("Cast", w.op("Floor", "x"), to=INT), w.constant(np.int64(3)))
    w.op("OneHot", low, w.constant(np.int64(3)), w.constant(np.float32([0, 1])), outputs=["hot"])
    w.op("Trilu", "x", upper=0, outputs=["lower"])
    return [value("x", shape=[2, 3, 5])], [value("y"), value("hot"), value("lower")]


def recurrent(w: Writer) -> tuple[list[Any], list[Any]]:
    w.op("LSTM", "x", w.random(1, 16, 3), w.random(1, 16, 4), w.random(1, 32), hidden_size=4, outputs=["all", "h", "c"])
    w.op("GRU", "x", w.random(1, 12, 3), w.random(1, 12, 4), hidden_size=4, outputs=["gru", "gh"])
    return [value("x", shape=[6, 2, 3])], [value(n) for n in ("all", "h", "c", "gru", "gh")]


@pytest.mark.parametrize("build", [convolutional, reductions, movement, sequences_of_math, recurrent])
def test_models_without_a_cache_run(build: Build, tmp_path: Path, rng: np.random.Generator) -> None:
    w = Writer(rng)
    model = w.model(*build(w), opset=20)
    assert_like_runtime(model, inputs_for(model, rng), tmp_path, 1e-4)


def test_a_model_with_texts_runs_and_its_digest_depends_on_them(tmp_path: Path, rng: np.random.Generator) -> None:
    digests = set()
    for word in ("c", "d"):
        w = Writer(rng)
        words = w.constant(np.array(["a", "b", word], object))
        picked = w.op("Gather", words, w.op("Cast", w.op("Ceil", w.op("Sigmoid", "x")), to=INT))
        same = w.op("Equal", picked, w.constant(np.array(["b", "c", "a"], object)))
        w.op("Cast", same, to=TensorProto.FLOAT, outputs=["y"])
        model = w.model([value("x", shape=[3])], [value("y", shape=[3])])
        assert_like_runtime(model, inputs_for(model, rng), tmp_path)
        digests.add(OnnxSource().open(save(model, tmp_path / f"{word}.onnx")).graph.digest())
    assert len(digests) == 2


@pytest.mark.parametrize("opset", [9, 11, 13, 17, 21, 23, 24])
def test_models_of_every_age_mean_what_they_meant(opset: int, tmp_path: Path, rng: np.random.Generator) -> None:
    w = Writer(rng)
    if opset < 13:
        x = w.op("Squeeze", w.op("Unsqueeze", "x", axes=[0]), axes=[0])
        x = w.op("ReduceSum", x, axes=[1], keepdims=1)
        parts = w.op("Split", w.op("Softmax", w.op("Add", x, "x"), axis=1), axis=1, split=[1, 4], outputs=["a", "b"])
    else:
        x = w.op("Squeeze", w.op("Unsqueeze", "x", w.constant([0])), w.constant([0]))
        x = w.op("ReduceSum", x, w.constant([1]), keepdims=1)
        x = w.op("Softmax", w.op("Add", x, "x"), axis=1)
        parts = w.op("Split", x, w.constant([1, 4]), axis=1, outputs=["a", "b"])
    assert parts
    w.op("ReduceMean", "b", w.constant([1]), outputs=["y"]) if opset >= 18 else w.op(
        "ReduceMean", "b", axes=[1], outputs=["y"]
    )
    if opset >= 11:
        w.op("Clip", "a", w.constant(np.float32(0.1)), outputs=["z"])
    else:
        w.op("Clip", "a", min=0.1, outputs=["z"])
    model = w.model([value("x", shape=["n", 5])], [value("y"), value("z")], opset=opset)
    assert_like_runtime(model, {"x": rng.standard_normal((3, 5)).astype(np.float32)}, tmp_path)


def test_a_scan_through_a_batch_is_refused(tmp_path: Path) -> None:
    """Opset 9 took the batch away, and onnx's converter does not notice."""
    body = helper.make_graph(
        [helper.make_node("Add", ["sum_in", "each"], ["sum_out"]), helper.make_node("Identity", ["sum_out"], ["out"])],
        "body",
        [value("sum_in", shape=[2]), value("each", shape=[2])],
        [value("sum_out", shape=[2]), value("out", shape=[2])],
    )
    node = helper.make_node("Scan", ["", "start", "x"], ["y", "z"], name="old", body=body, num_scan_inputs=1)
    inputs = [value("start", shape=[1, 2]), value("x", shape=[1, 3, 2])]
    graph = helper.make_graph([node], "g", inputs, [value("y", shape=[1, 2]), value("z", shape=[1, 3, 2])])
    path = tmp_path / "scan.onnx"
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 8)], ir_version=3), path)
    with pytest.raises(UnsupportedError, match=r"old is a Scan of opset 8.*\n?.*opset 9 or later"):
        OnnxSource().open(path)


def test_if_takes_the_branch_that_its_condition_says(tmp_path: Path, rng: np.random.Generator) -> None:
    def branch(name: str, op_type: str) -> Any:
        weight = numpy_helper.from_array(rng.standard_normal(4).astype(np.float32), f"{name}.w")
        nodes = [helper.make_node(op_type, ["scaled", f"{name}.w"], [f"{name}.y"])]
        return helper.make_graph(nodes, name, [], [value(f"{name}.y", shape=["n", 4])], [weight])

    w = Writer(rng)
    w.op("Mul", "x", w.constant(np.float32(2)), outputs=["scaled"])
    w.op("If", "which", then_branch=branch("then", "Add"), else_branch=branch("else", "Sub"), outputs=["y"])
    model = w.model([value("x", shape=["n", 4]), value("which", BOOL, [])], [value("y", shape=["n", 4])], opset=18)
    for which in (True, False):
        inputs = {"x": rng.standard_normal((2, 4)).astype(np.float32), "which": np.asarray(which)}
        assert_like_runtime(model, inputs, tmp_path)


def test_loop_carries_values_and_collects_others(tmp_path: Path, rng: np.random.Generator) -> None:
    model = adding_loop(rng, 20, opset=18)
    assert_like_runtime(model, {"x": rng.standard_normal(3).astype(np.float32) + 1.0}, tmp_path)


def test_a_loop_that_never_runs_gives_empty_collections_of_the_right_type(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    nodes = [helper.make_node("Identity", ["c"], ["d"]), helper.make_node("Add", ["i", "n"], ["collected"])]
    body = helper.make_graph(
        nodes, "body", [value("i", INT, []), value("c", BOOL, [])], [value("d", BOOL, []), value("collected", INT, [])]
    )
    w = Writer(rng)
    w.op("Loop", "n", "", body=body, outputs=["steps"])
    model = w.model([value("n", INT, [])], [value("steps", INT, ["k"])], opset=18)
    for count in (0, 3):
        assert_like_runtime(model, {"n": np.asarray(count)}, tmp_path)


def test_weights_listed_as_inputs_stay_weights(tmp_path: Path, rng: np.random.Generator) -> None:
    w = Writer(rng)
    weight = w.random(4, 3)
    w.op("MatMul", "x", weight, outputs=["y"])
    model = w.model([value("x", shape=["n", 4]), value(weight, shape=[4, 3])], [value("y")], opset=9)
    model.ir_version = 3
    opened = OnnxSource().open(save(model, tmp_path / "model.onnx"))
    assert opened.graph.input_names == ["x"]
    opened.graph.check()


def test_quantized_models_run_exactly(tmp_path: Path, rng: np.random.Generator) -> None:
    w = Writer(rng)
    scale, zero = w.constant(np.float32(0.05)), w.constant(np.uint8(120))
    x = w.op("DequantizeLinear", w.op("QuantizeLinear", "x", scale, zero), scale, zero)
    weight = w.constant(rng.integers(-127, 127, (8, 6)).astype(np.int8))
    scales = w.constant((rng.random(6) * 0.1).astype(np.float32))
    m = w.op("DequantizeLinear", weight, scales, w.constant(np.zeros(6, np.int8)), axis=1)
    w.op("MatMul", x, m, outputs=["y"])
    model = w.model([value("x", shape=["n", 8])], [value("y")], opset=21)
    assert_like_runtime(model, {"x": rng.standard_normal((3, 8)).astype(np.float32)}, tmp_path)
