"""ONNX graphs that OpenVINO does not take as they stand run as in onnxruntime, or are refused before compiling.

Draws: float32 sums in another order differ by about 1e-6 of their size; the tolerances are ten times that or more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto
from onnx_corpus import compile_model, differences
from onnx_models import Writer, runtime, value

from transom.errors import EngineError

HALF, INT = TensorProto.FLOAT16, TensorProto.INT64
Build = Callable[[Writer], Any]


def expand_by_where(w: Writer) -> Any:
    """As torch exports `Tensor.expand` with -1: the target is computed by ConstantOfShape, Mul, Equal and Where."""
    batch = w.op("Unsqueeze", w.op("Gather", w.op("Shape", "x"), w.constant(np.int64(0)), axis=0), w.constant([0]))
    target = w.op("Concat", batch, w.constant([-1]), w.constant([-1]), axis=0)
    ones = w.op("ConstantOfShape", w.constant([3]), value=_tensor(np.int64([1])))
    absent = w.op("Equal", target, w.op("Mul", ones, w.constant(np.int64(-1))))
    token = w.op("Expand", w.random(1, 1, 4), w.op("Where", absent, ones, target))
    w.op("Concat", token, "x", axis=1, outputs=["y"])
    return w.model([value("x", shape=["n", 3, 4])], [value("y", shape=["n", 4, 4])], opset=17)


def squeeze_without_axes(w: Writer) -> Any:
    w.op("Squeeze", "x", outputs=["y"])
    return w.model([value("x", shape=[1, 3, 1, 4])], [value("y", shape=[3, 4])])


def axes_computed_by_nodes(w: Writer) -> Any:
    """As ONNX's own body of RMSNormalization: the axes are a Range up to the rank."""
    rank = w.op("Size", w.op("Shape", "x"))
    axes = w.op("Range", w.op("Sub", rank, w.constant(np.int64(2))), rank, w.constant(np.int64(1)))
    w.op("ReduceMean", "x", axes, outputs=["y"])
    return w.model([value("x", shape=[2, 3, 4])], [value("y", shape=[2, 1, 1])])


def reduced_without_axes(w: Writer) -> Any:
    w.op("ReduceSum", "x", "none", keepdims=1, outputs=["y"])
    w.weights.append(_tensor(np.zeros(0, np.int64), "none"))
    return w.model([value("x", shape=[2, 3, 4])], [value("y", shape=[1, 1, 1])])


def half_precision(w: Writer) -> Any:
    x = w.op("Reciprocal", w.op("Add", w.op("Abs", "x"), w.constant(np.float16(1))))
    w.op("Swish", x, alpha=1.5, outputs=["y"])
    return w.model([value("x", HALF, [2, 3])], [value("y", HALF, [2, 3])], opset=24)


def equal_elements(w: Writer) -> Any:
    w.op("TopK", w.op("Round", "x"), w.constant([3]), outputs=["best", "places"])
    return w.model([value("x", shape=[4, 9])], [value("best", shape=[4, 3]), value("places", INT, [4, 3])])


def tiles_as_many_as_computed(w: Writer) -> Any:
    """OpenVINO's own Tile leaves parts unwritten where three last axes are repeated."""
    w.op("Tile", "x", w.op("Shape", "x"), outputs=["y"])
    return w.model([value("x", shape=["a", "b", "c", "d"])], [value("y")])


def in_branches(w: Writer, op_type: str, second: str, outputs: list[Any]) -> Any:
    """An operator in both branches of an If, which takes the second one: the sum of `x` is no number above 1e9."""
    from onnx import helper

    def branch(name: str) -> Any:
        names = [f"{name}_{o.name}" for o in outputs]
        made = [value(n, o.type.tensor_type.elem_type) for n, o in zip(names, outputs, strict=True)]
        return helper.make_graph([helper.make_node(op_type, ["x", second], names)], name, [], made)

    condition = w.op("Greater", w.op("ReduceSum", "x", keepdims=0), w.constant(np.float32(1e9)))
    w.op("If", condition, then_branch=branch("yes"), else_branch=branch("no"), outputs=[o.name for o in outputs])
    return outputs


def tiles_in_a_branch(w: Writer) -> Any:
    outputs = in_branches(w, "Tile", w.op("Shape", "x"), [value("y")])
    return w.model([value("x", shape=["a", "b", "c", "d"])], outputs)


def equal_elements_in_a_branch(w: Writer) -> Any:
    w.op("Round", "z", outputs=["x"])
    outputs = in_branches(w, "TopK", w.constant([20]), [value("best"), value("places", INT)])
    return w.model([value("z", shape=[2, 40])], outputs)


def boxes_that_overlap_by_the_threshold(w: Writer) -> Any:
    """Of equal boxes and boxes apart, with thresholds of 0 (the default) and of what two of them overlap by."""
    corners = np.float32([[0, 0, 2, 2], [0, 0, 2, 1], [0, 0, 2, 1], [4, 4, 6, 6], [4, 4, 6, 7], [8, 8, 8, 9]])
    scores = w.op("Softmax", "x")
    boxes, most, least = w.constant(corners[None]), w.constant([9]), w.constant(np.float32([0]))
    w.op("NonMaxSuppression", boxes, scores, most, outputs=["apart"])
    w.op("NonMaxSuppression", boxes, scores, most, w.constant(np.float32([0.5])), least, outputs=["half"])
    w.op("NonMaxSuppression", boxes, scores, most, w.constant(np.float32([2 / 3])), least, outputs=["thirds"])
    return w.model([value("x", shape=[1, 1, 6])], [value(name, INT) for name in ("apart", "half", "thirds")])


def single_inputs(w: Writer) -> Any:
    w.op("Hardmax", w.op("Max", w.op("Sum", "x")), outputs=["y"])
    return w.model([value("x", shape=[2, 5])], [value("y", shape=[2, 5])])


def integer_products(w: Writer) -> Any:
    """As dynamically quantized encoders have it."""
    q, scale, zero = w.op("DynamicQuantizeLinear", "x", outputs=3)
    weight = w.constant(w.rng.integers(-127, 127, (8, 6)).astype(np.int8))
    product = w.op("MatMulInteger", q, weight, zero, w.constant(np.int8(0)))
    w.op("Mul", w.op("Cast", product, to=1), scale, outputs=["y"])
    return w.model([value("x", shape=["n", 8])], [value("y", shape=["n", 6])], opset=17)


def elements_by_fewer_rows(w: Writer) -> Any:
    """Where the indices are constants, and where they are computed; from the end, too."""
    w.op("GatherElements", "x", w.constant([[-1, 0]]), axis=1, outputs=["y"])
    best = w.op("ArgMax", w.op("Slice", "x", w.constant([0]), w.constant([1]), w.constant([0])), axis=1)
    w.op("GatherElements", "x", w.op("Sub", best, w.constant([[3]])), axis=-1, outputs=["z"])
    w.op("GatherElements", "x", w.constant([[1], [0], [1]]), axis=0, outputs=["u"])
    return w.model([value("x", shape=["n", 3])], [value("y"), value("z"), value("u")])


def parts_that_the_axis_does_not_divide_into(w: Writer) -> Any:
    w.op("Split", "x", num_outputs=3, axis=-1, outputs=["a", "b", "c"])
    w.op("Split", w.op("Concat", "x", "x", axis=0), num_outputs=3, outputs=["d", "e", "f"])
    names = [value(name) for name in "abcdef"]
    return w.model([value("x", shape=["n", 7])], names, opset=18)


def elements_in_a_branch(w: Writer) -> Any:
    outputs = in_branches(w, "GatherElements", w.constant([[1], [-2], [0]]), [value("y")])
    return w.model([value("x", shape=["n", "m"])], outputs)


def parts_in_a_branch(w: Writer) -> Any:
    from onnx import helper

    def branch(name: str) -> Any:
        parts = [f"{name}.{i}" for i in range(3)]
        nodes = [helper.make_node("Split", ["x"], parts, num_outputs=3)]
        nodes += [helper.make_node("Concat", parts[::-1], [f"{name}.y"], axis=0)]
        return helper.make_graph(nodes, name, [], [value(f"{name}.y")])

    condition = w.op("Greater", w.op("ReduceSum", "x", keepdims=0), w.constant(np.float32(1e9)))
    w.op("If", condition, then_branch=branch("yes"), else_branch=branch("no"), outputs=["y"])
    return w.model([value("x", shape=["n", 3])], [value("y")])


def masked(w: Writer, number: float) -> str:
    """Each row of `x` [2, 4] with less of its elements; the last row with none."""
    mask = w.constant(np.array([[True, False, True, True], [False] * 4]))
    return str(w.op("Where", mask, "x", w.constant(np.float32(number))))


def softmax_of_rows_without_elements(w: Writer) -> Any:
    x, axis = masked(w, -np.inf), w.constant([1])
    none = w.op("Equal", w.op("ReduceMax", x, axis), w.constant(np.float32(-np.inf)))
    w.op("Where", none, w.constant(np.float32(0)), w.op("Softmax", x), outputs=["y"])
    w.op("ReduceMin", w.op("Neg", x), keepdims=0, outputs=["z"])
    w.op("ReduceMin", w.op("Neg", x), axis, outputs=["u"])
    w.op("ReduceMax", masked(w, float(np.finfo(np.float32).min)), axis, outputs=["v"])
    w.op("ReduceLogSumExp", x, axis, outputs=["s"])
    return w.model([value("x", shape=["n", 4])], [value(name) for name in "yzuvs"])


def truth_of_nan(w: Writer) -> Any:
    w.op("Cast", masked(w, np.nan), to=TensorProto.BOOL, outputs=["y"])
    return w.model([value("x", shape=["n", 4])], [value("y", TensorProto.BOOL)])


def positions_behind_padding(w: Writer) -> Any:
    """As RoBERTa has it."""
    real = w.op("Cast", w.op("Not", w.op("Equal", "ids", w.constant(np.int64(1)))), to=TensorProto.INT32)
    counted = w.op("Mul", w.op("CumSum", real, w.constant(np.int64(1))), real)
    positions = w.op("Add", w.op("Cast", counted, to=INT), w.constant(np.int64(1)))
    w.op("Gather", w.random(9, 4), positions, outputs=["y"])
    w.op("ReduceSum", "ids", w.constant([1]), outputs=["z"])
    return w.model([value("ids", INT, ["n", 5])], [value("y"), value("z", INT)])


def buckets_of_distances(w: Writer) -> Any:
    """As T5 has it: the logarithm of a distance of 0 is -inf."""
    length = w.op("Gather", w.op("Shape", "x"), w.constant(np.int64(1)))
    places = w.op("Range", w.constant(np.int64(0)), length, w.constant(np.int64(1)))
    distance = w.op("Sub", w.op("Unsqueeze", places, w.constant([0])), w.op("Unsqueeze", places, w.constant([1])))
    behind = w.op("Mul", w.op("Cast", w.op("Greater", distance, w.constant(np.int64(0))), to=INT), w.constant([4]))
    distance = w.op("Abs", distance)
    part = w.op("Div", w.op("Cast", distance, to=TensorProto.FLOAT), w.constant(np.float32(2)))
    wide = w.op("Div", w.op("Mul", w.op("Log", part), w.constant(np.float32(2))), w.constant(np.float32(1.4)))
    bucket = w.op("Add", w.op("Cast", wide, to=INT), w.constant(np.int64(2)))
    bucket = w.op("Min", bucket, w.constant(np.int64(3)))
    small = w.op("Where", w.op("Less", distance, w.constant(np.int64(2))), distance, bucket)
    w.op("Gather", w.random(8, 2), w.op("Add", behind, small), outputs=["y"])
    return w.model([value("x", shape=["n", 7])], [value("y")])


def places_in_a_flattened_map(w: Writer) -> Any:
    width = w.op("Gather", w.op("Shape", "x"), w.constant(np.int64(2)))
    flat = w.op("Reshape", "x", w.constant([0, -1]))
    _, places = w.op("TopK", flat, w.constant([4]), outputs=["best", "places"])
    w.op("Div", places, width, outputs=["rows"])
    w.op("Mod", places, width, outputs=["columns"])
    w.op("Add", w.op("Mul", "rows", width), "columns", outputs=["again"])
    names = ("places", "rows", "columns", "again")
    return w.model([value("x", shape=["n", "h", "w"])], [value(name, INT) for name in names])


def sliced_to_the_end(w: Writer) -> Any:
    """Ends that int32 does not hold."""
    last = w.constant([np.iinfo(np.int64).max])
    rows = w.op("Slice", "x", w.constant([1]), last, w.constant([0]))
    w.op("Slice", rows, w.constant([0, -3]), w.op("Concat", last, last, axis=0), outputs=["y"])
    return w.model([value("x", shape=["n", 5])], [value("y")])


def whole_parts(w: Writer) -> Any:
    w.op("Cast", w.op("Mul", "x", w.constant(np.float32(1e6))), to=INT, outputs=["y"])
    return w.model([value("x", shape=[3, 5])], [value("y", INT)])


def _tensor(array: Any, name: str = "") -> Any:
    from onnx import numpy_helper

    return numpy_helper.from_array(np.asarray(array), name)


RUN = [
    expand_by_where, squeeze_without_axes, axes_computed_by_nodes, reduced_without_axes, half_precision, equal_elements,
    integer_products, single_inputs, tiles_as_many_as_computed, tiles_in_a_branch, equal_elements_in_a_branch,
    boxes_that_overlap_by_the_threshold, elements_by_fewer_rows, elements_in_a_branch, parts_in_a_branch,
    parts_that_the_axis_does_not_divide_into,
    softmax_of_rows_without_elements, truth_of_nan, positions_behind_padding, buckets_of_distances,
    places_in_a_flattened_map, sliced_to_the_end, whole_parts,
]  # fmt: skip


def numbers(rng: np.random.Generator, kind: int, shape: list[int]) -> Any:
    if kind == INT:
        return rng.integers(0, 4, shape)
    return rng.standard_normal(shape).astype(np.float16 if kind == HALF else np.float32)


@pytest.mark.parametrize("build", RUN)
def test_a_graph_runs_as_onnxruntime_runs_it(build: Build, rng: np.random.Generator) -> None:
    model = build(Writer(rng))
    compiled = compile_model(model)
    assert compiled.session is not None, compiled.refused
    for _ in range(2):
        inputs = {}
        for i in model.graph.input:
            shape = [d.dim_value or 2 for d in i.type.tensor_type.shape.dim]
            inputs[i.name] = numbers(rng, i.type.tensor_type.elem_type, shape)
            inputs[i.name].flags.writeable = False  # the caller may hold a mapped file
        wanted = dict(zip((o.name for o in model.graph.output), runtime(model).run(None, inputs), strict=True))
        tolerance = 1e-2 if build in (half_precision, integer_products) else 1e-5
        assert not differences(compiled.session.run(inputs), wanted, tolerance, tolerance)


def test_nan_on_one_side_is_a_difference() -> None:
    nan, one = {"y": np.float32([np.nan, 1])}, {"y": np.float32([1, 1])}
    assert not differences(nan, nan)
    assert differences(nan, one)
    assert differences(one, nan)


def gru_by_batch(w: Writer) -> Any:
    w.op("GRU", "x", w.random(1, 12, 3), w.random(1, 12, 4), hidden_size=4, layout=1, outputs=["y"])
    return w.model([value("x", shape=[2, 5, 3])], [value("y")])


def pool_behind_the_input(w: Writer) -> Any:
    w.op("MaxPool", "x", kernel_shape=[1, 1], strides=[2, 2], ceil_mode=1, outputs=["y"])
    return w.model([value("x", shape=[1, 1, 2, 2])], [value("y")], opset=24)


def filtered_resize(w: Writer) -> Any:
    w.op("Resize", "x", "", w.constant(np.float32([1, 1, 0.6, 0.6])), mode="linear", antialias=1, outputs=["y"])
    return w.model([value("x", shape=[1, 1, 4, 4])], [value("y")])


def text(w: Writer) -> Any:
    w.op("Equal", "x", "x", outputs=["y"])
    return w.model([value("x", TensorProto.STRING, [3])], [value("y", TensorProto.BOOL, [3])])


def sequences(w: Writer) -> Any:
    w.op("SequenceAt", w.op("SequenceConstruct", "x", "x"), w.constant(np.int64(0)), outputs=["y"])
    return w.model([value("x", shape=[2])], [value("y")])


def doubles(w: Writer) -> Any:
    w.op("Add", "x", "x", outputs=["y"])
    return w.model([value("x", TensorProto.DOUBLE, [3])], [value("y", TensorProto.DOUBLE, [3])])


def of_type(op_type: str, kind: int, count: int = 2, **attributes: Any) -> Build:
    """An operator on integers of a type."""

    def build(w: Writer) -> Any:
        w.op(op_type, *["x"] * count, outputs=["y"], **attributes)
        return w.model([value("x", kind, [3])], [value("y", kind)])

    build.__name__ = f"{op_type}_{TensorProto.DataType.Name(kind)}"
    return build


def hashes(w: Writer) -> Any:
    w.op("Mod", w.op("Mul", "x", w.constant(np.int64(2654435761))), w.constant(np.int64(1000)), outputs=["y"])
    return w.model([value("x", INT, [3])], [value("y", INT)])


def floats_without_fractions(w: Writer) -> Any:
    """OpenVINO's int64 does not hold 3e9."""
    w.op("Cast", w.op("Cast", "x", to=INT), to=TensorProto.FLOAT, outputs=["y"])
    return w.model([value("x", shape=[3])], [value("y")])


def squares_of_places(w: Writer) -> Any:
    places = w.op("Range", w.constant(np.int64(0)), w.op("Size", "x"), w.constant(np.int64(1)))
    w.op("Mul", places, places, outputs=["y"])
    return w.model([value("x", shape=["n"])], [value("y", INT)])


def sums_of_places(w: Writer) -> Any:
    places = w.op("Range", w.constant(np.int64(0)), w.op("Size", "x"), w.constant(np.int64(1)))
    w.op("CumSum", places, w.constant(np.int64(0)), outputs=["y"])
    return w.model([value("x", shape=["n"])], [value("y", INT)])


def counting_loop(step: int | None) -> Build:
    """A Loop that carries an integer: it adds a step, or the integer itself."""

    def build(w: Writer) -> Any:
        from onnx import helper

        nodes = [helper.make_node("Identity", ["c"], ["more"])]
        nodes += [helper.make_node("Add", ["n", "n" if step is None else "step"], ["m"])]
        w.weights.append(_tensor(np.int64(step or 0), "step"))
        inputs = [value("i", INT, []), value("c", TensorProto.BOOL, []), value("n", INT, [])]
        body = helper.make_graph(nodes, "body", inputs, [value("more", TensorProto.BOOL, []), value("m", INT, [])])
        count = w.op("Size", "x")
        w.op("Loop", count, w.constant(np.bool_(True)), w.constant(np.int64(1)), body=body, outputs=["y"])
        return w.model([value("x", shape=["n"])], [value("y", INT)])

    build.__name__ = f"counting_loop_{step}"
    return build


RUN.append(counting_loop(3))


def endless_loop(w: Writer) -> Any:
    """ONNX: a Loop with a negative trip count does not turn."""
    from onnx import helper

    nodes = [helper.make_node("Identity", ["c"], ["more"]), helper.make_node("Neg", ["n"], ["m"])]
    inputs = [value("i", INT, []), value("c", TensorProto.BOOL, []), value("n", shape=[3])]
    body = helper.make_graph(nodes, "body", inputs, [value("more", TensorProto.BOOL, []), value("m", shape=[3])])
    w.op("Loop", w.constant(np.int64(-5)), w.constant(np.bool_(True)), "x", body=body, outputs=["y"])
    return w.model([value("x", shape=[3])], [value("y", shape=[3])])


INTEGERS = {
    of_type(op_type, kind): op_type
    for op_type, kind in (
        ("Add", TensorProto.UINT8), ("Sub", TensorProto.INT8), ("Mul", TensorProto.UINT8), ("Div", TensorProto.INT8),
        ("Sub", TensorProto.UINT32), ("Mul", TensorProto.UINT64), ("Mul", INT), ("Pow", INT),
    )
}  # fmt: skip

REFUSED = {
    **INTEGERS, of_type("BitShift", TensorProto.UINT8, direction="LEFT"): "BitShift",
    of_type("ReduceProd", INT, 1): "ReduceProd", of_type("ReduceProd", TensorProto.INT32, 1): "ReduceProd",
    hashes: "Mul", squares_of_places: "Mul", sums_of_places: "CumSum", floats_without_fractions: "Cast",
    counting_loop(None): "Loop", endless_loop: "Loop",
    doubles: "Add", gru_by_batch: "GRU", pool_behind_the_input: "MaxPool", filtered_resize: "Resize", text: "Equal",
    sequences: "SequenceAt",
}  # fmt: skip


@pytest.mark.parametrize("build", REFUSED)
def test_a_node_that_openvino_computes_wrong_or_not_is_refused_before_compiling(
    build: Build, rng: np.random.Generator
) -> None:
    compiled = compile_model(build(Writer(rng)))
    assert compiled.session is None
    assert REFUSED[build] in compiled.refused


def test_only_the_nodes_that_cannot_run_are_refused(rng: np.random.Generator) -> None:
    w = Writer(rng)
    x = w.op("Relu", "x")
    det = w.op("Det", x)
    w.op("Tanh", det, outputs=["y"])
    w.op("Squeeze", x, outputs=["z"])
    compiled = compile_model(w.model([value("x", shape=[1, 3, 3])], [value("y", shape=[1]), value("z")]))
    assert set(compiled.refused) == {"Det"}


def added(kind: int) -> Build:
    def build(w: Writer) -> Any:
        w.op("Add", "x", w.constant([1]), outputs=["y"])
        return w.model([value("x", kind, ["n"])], [value("y", kind)])

    return build


def summed(w: Writer) -> Any:
    w.op("ReduceSum", "x", outputs=["y"])
    return w.model([value("x", INT, ["n"])], [value("y", INT)])


def widened(w: Writer) -> Any:
    w.op("Cast", "x", to=INT, outputs=["y"])
    return w.model([value("x", TensorProto.UINT32, ["n"])], [value("y", INT)])


def halves(w: Writer) -> Any:
    w.op("Div", "x", w.constant(np.array([2], np.int32)), outputs=["y"])
    return w.model([value("x", TensorProto.INT32, ["n"])], [value("y", TensorProto.INT32)])


@pytest.mark.parametrize(
    ("build", "right", "wrong", "named"),
    [
        (added(INT), np.int64([2**30 - 1, -5]), np.int64([7, 1764763200000]), "The input x holds 1764763200000"),
        (added(INT), np.int64([-(2**30) + 1]), np.int64([-(2**31)]), "The input x holds -2147483648"),
        (summed, np.int64([2**23, -5, 2**22]), np.int64([2**24, -(2**24), 3]), "The elements of the input x"),
        (widened, np.uint32([2**31 - 1, 0]), np.uint32([2**32 - 1, 5]), "The input x holds 4294967295"),
        (halves, np.int32([2**24, -7, -(2**24)]), np.int32([2**31 - 1]), "The input x holds 2147483647"),
        (whole_parts, np.full((3, 5), 2e3, np.float32), np.full((3, 5), 3e3, np.float32), "The output y has numbers"),
        (whole_parts, np.full((3, 5), -2e3, np.float32), np.full((3, 5), -3e3, np.float32), "The output y has numbers"),
    ],
)
def test_integers_that_openvino_would_cut_are_an_error(
    build: Build, right: Any, wrong: Any, named: str, rng: np.random.Generator
) -> None:
    model = build(Writer(rng))
    compiled = compile_model(model)
    assert compiled.session is not None, compiled.refused
    wanted = dict(zip((o.name for o in model.graph.output), runtime(model).run(None, {"x": right}), strict=True))
    assert not differences(compiled.session.run({"x": right}), wanted, 0, 0)
    with pytest.raises(EngineError, match=named):
        compiled.session.run({"x": wrong})
    assert not differences(compiled.session.run({"x": right}), wanted, 0, 0)


def test_inputs_whose_shapes_do_not_fit_are_an_error_and_never_the_answer_before(rng: np.random.Generator) -> None:
    """With one thread OpenVINO itself reports none."""
    w = Writer(rng)
    w.op("MatMul", "x", "z", outputs=["y"])
    compiled = compile_model(w.model([value("x", shape=["a", "b"]), value("z", shape=["c", "d"])], [value("y")]))
    assert compiled.session is not None, compiled.refused
    ones = np.ones((2, 3), np.float32)
    with pytest.raises(EngineError, match="stage body"):
        compiled.session.run({"x": ones, "z": ones})
    assert (compiled.session.run({"x": ones, "z": ones.T})["y"] == 3).all()
    with pytest.raises(EngineError, match="stage body"):
        compiled.session.run({"x": ones, "z": ones})
