"""OpenVINO's ONNX frontend, for ONNX operators that decoders do not need and for graphs with control flow."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from transom.errors import EngineError, message_lines
from transom.graph.reading import constant_of
from transom.graph.weights import Array

if TYPE_CHECKING:
    import onnx_ir as ir

    from transom.graph import Graph

Node = Any

OPERATORS = frozenset({
    "Acos", "Acosh", "ArgMax", "ArgMin", "Asin", "Asinh", "Atan", "Atanh", "Attention", "AveragePool",
    "BatchNormalization", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "CastLike", "Celu",
    "Clip", "Col2Im", "Compress", "ConstantOfShape", "Conv", "ConvInteger", "ConvTranspose", "Cosh", "CumSum",
    "DepthToSpace", "Einsum", "Elu", "EyeLike", "Flatten", "GRU", "GatherElements", "GatherND", "Gemm",
    "GlobalAveragePool", "GlobalMaxPool", "GridSample", "GroupNormalization", "HardSigmoid", "HardSwish", "Hardmax",
    "InstanceNormalization", "IsInf", "IsNaN", "LRN", "LSTM", "LayerNormalization", "LeakyRelu", "LogSoftmax",
    "LpNormalization", "LpPool", "MatMulInteger", "Max", "MaxPool", "Mean", "MeanVarianceNormalization", "Min", "Mish",
    "Mod", "NonMaxSuppression", "NonZero", "OneHot", "PRelu", "Pad", "Pow", "QLinearConv", "QLinearMatMul",
    "QuantizeLinear", "RNN", "Range", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax",
    "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Resize", "ReverseSequence", "RoiAlign",
    "Round", "ScatterElements", "ScatterND", "Selu", "Shrink", "Sinh", "Size", "Softsign", "SpaceToDepth", "Sum",
    "Tan", "ThresholdedRelu", "Tile", "TopK", "Trilu",
})  # fmt: skip
"""Operators that this backend converts with the frontend of OpenVINO 2026.4, at opset 24."""

CONTROL_FLOW = frozenset({"If", "Loop", "Scan"})
"""Claimed only in graphs that the frontend reads as a whole."""

SMALL = 4096
"""Constants of up to this many bytes are passed to the frontend by value, since it needs axes and shapes."""
FOLDED_NODES = 64
"""Nodes behind a value up to which it is folded. Index arithmetic takes a few."""

_ONNX_TYPES = {
    "f32": 1, "u8": 2, "i8": 3, "u16": 4, "i16": 5, "i32": 6, "i64": 7, "boolean": 9, "f16": 10, "f64": 11, "u32": 12,
    "u64": 13, "bf16": 16,
}  # fmt: skip


def convert(node: ir.Node, inputs: Sequence[Node | None]) -> list[Node]:
    """Convert one standard node whose inputs are lowered (`openvino.Output`, None where absent).

    Raises:
        EngineError: the frontend cannot read the node; the message names it.
    """
    import onnx
    import onnx_ir as ir
    import openvino as ov
    from onnx import helper, numpy_helper

    from transom.ops.functions import OPSET

    proto = ir.to_proto(node)
    del proto.input[:], proto.output[:]
    declared, constants, given = [], [], []
    for i, (value, lowered) in enumerate(zip(node.inputs, inputs, strict=True)):
        if lowered is None:
            proto.input.append("")
            continue
        name = f"x{i}"
        proto.input.append(name)
        array = constant_of(value)
        if array is None:
            array = folded(lowered)
        if array is not None and array.nbytes <= SMALL and array.dtype.kind in "iufb":
            constants.append(numpy_helper.from_array(np.asarray(array, order="C"), name))
            continue
        shape = _dimensions(lowered)
        kind = lowered.get_element_type() if hasattr(lowered, "get_output_element_type") else lowered.element_type
        declared.append(helper.make_tensor_value_info(name, _ONNX_TYPES[kind.to_string()], shape))
        given.append(lowered)
    proto.output.extend(f"y{i}" for i in range(len(node.outputs)))
    outputs = [onnx.ValueInfoProto(name=name) for name in proto.output]
    graph = helper.make_graph([proto], "node", declared, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    try:
        read = ov.Core().read_model(model.SerializeToString())
    except RuntimeError as e:
        last = message_lines(e)[-1]
        raise EngineError(f"OpenVINO cannot read the node {node.name} ({node.op_type}): {last}") from e
    inside = [n for n in read.get_ordered_ops() if n.get_type_name() not in ("Parameter", "Result")]
    by_name = {name: p for p in read.get_parameters() for name in p.output(0).get_names()}
    for value_info, lowered in zip(declared, given, strict=True):
        if value_info.name in by_name:  # the frontend drops an input that the node does not need
            by_name[value_info.name].output(0).replace(lowered)
    for made in inside:
        made.constructor_validate_and_infer_types()  # shapes derived from a parameter would stay unknown
        _mend_node(made)
    return [result.input_value(0) for result in read.get_results()]


def read_whole(graph: Graph, folder: Path) -> Any:
    """The graph as an `openvino.Model`, read from a file that is written to the folder.

    Raises:
        EngineError: the frontend cannot read it; the message quotes it.
    """
    import openvino as ov

    path = folder / "graph.onnx"
    graph.save(path)
    try:
        model = ov.Core().read_model(path)
    except RuntimeError as e:
        raise EngineError(f"OpenVINO cannot read the graph {graph.name}: {message_lines(e)[-1]}") from e
    for parameter in model.get_parameters():
        parameter.set_friendly_name(parameter.output(0).get_any_name())
    _mend(model)
    return model


def _mend(model: Any) -> None:
    """Replace what OpenVINO computes differently from ONNX, in the bodies of control flow, too."""
    for node in model.get_ordered_ops():
        _mend_node(node)
        if node.get_type_name() == "If":
            _mend(node.get_then_body())
            _mend(node.get_else_body())
        elif node.get_type_name() in ("Loop", "TensorIterator"):
            _mend(node.get_function())


def _mend_node(node: Any) -> None:
    _sort_stably(node)
    _tile_in_two(node)
    _keep_equal_overlap(node)
    _keep_infinities(node)
    _turn_never(node)
    _cast_to_the_nearest(node)
    _gather_within(node)
    _split_unevenly(node)


def _sort_stably(node: Any) -> None:
    """ONNX: of equal elements, TopK puts the one with the lower index first."""
    if node.get_type_name() == "TopK" and node.get_attributes().get("sort") in ("value", "index"):
        node.set_attribute("stable", True)


def _tile_in_two(node: Any) -> None:
    """Give the last axis a Tile of its own, where the repeats are read when the graph runs.

    OpenVINO 2026.4 leaves parts of the result unwritten if such a Tile repeats each of the last three of four or more
    axes.
    """
    import openvino as ov
    from openvino import opset15 as op

    if node.get_type_name() != "Tile" or node.input_value(1).get_node().get_type_name() == "Constant":
        return
    data, repeats = node.input_value(0), node.input_value(1)
    rank = data.get_partial_shape().rank
    if rank.is_dynamic or rank.get_length() < 4:
        return
    ones = np.ones(rank.get_length(), np.int64)
    last = op.constant(np.arange(rank.get_length()) == rank.get_length() - 1)
    whole = op.convert(repeats, ov.Type.i64)
    others = op.tile(data, op.select(last, op.constant(ones), whole))
    node.output(0).replace(op.tile(others, op.select(last, whole, op.constant(ones))).output(0))


def _keep_equal_overlap(node: Any) -> None:
    """ONNX: NonMaxSuppression drops boxes that overlap by more than the threshold. OpenVINO 2026.4 drops those that
    overlap as much, which are all boxes if the threshold is 0, ONNX's default: it gets the next larger float32."""
    from openvino import opset15 as op

    if node.get_type_name() != "NonMaxSuppression" or node.get_input_size() < 4:
        return
    given = node.input_value(3)
    step = op.multiply(given, op.constant(np.float32(0.75 * 2.0**-23)))  # three quarters of a unit to one and a half
    larger = op.maximum(op.add(given, step), op.constant(np.finfo(np.float32).tiny))
    node.input(3).replace_source_output(larger.output(0))


def _keep_infinities(node: Any) -> None:
    """OpenVINO 2026.4 begins a ReduceMax at the least finite number, which it gives for a row of -inf; and a ReduceMin
    at the greatest. No half of a finite number is that, so that of halves only infinities leave it, and twice it is
    infinite."""
    from openvino import opset15 as op

    if node.get_type_name() not in ("ReduceMax", "ReduceMin") or not node.get_element_type().is_real():
        return
    if not node.output(0).get_names():
        return  # part of another operator
    readers = list(node.output(0).get_target_inputs())
    half, two = (op.convert(op.constant(np.float32(f)), node.get_element_type()) for f in (0.5, 2))
    node.input(0).replace_source_output(op.multiply(node.input_value(0), half).output(0))
    doubled = op.multiply(node, two)
    for reader in readers:
        reader.replace_source_output(doubled.output(0))


def _turn_never(node: Any) -> None:
    """ONNX: a Loop with a negative trip count does not turn. OpenVINO's never ends. (It has a constant -1 where the
    ONNX node has no trip count.)"""
    from openvino import opset15 as op

    if node.get_type_name() != "Loop" or node.input_value(0).get_node().get_type_name() == "Constant":
        return
    count = node.input_value(0)
    none = op.convert(op.constant(np.int64(0)), count.get_element_type())
    node.input(0).replace_source_output(op.maximum(count, none).output(0))


def _cast_to_the_nearest(node: Any) -> None:
    """OpenVINO's int64 has 32 bits, and greater numbers become the least integer: they become the greatest."""
    if node.get_type_name() == "Convert" and node.get_element_type().to_string() == "i64":
        source = node.input_value(0)
        if source.get_element_type().to_string() in ("f32", "bf16"):
            node.input(0).replace_source_output(bounded(source))


def bounded(source: Any) -> Any:
    """An `openvino.Output` of floats in float32, with each number above int32's as the greatest that both hold."""
    from openvino import opset15 as op

    wide = op.convert(source, np.float32)  # bfloat16, too, has such numbers
    return op.minimum(wide, op.constant(np.float32(2**31 - 128))).output(0)


def _gather_within(node: Any) -> None:
    if node.get_type_name() == "GatherElements":
        data, indices = node.input_value(0), node.input_value(1)
        node.input(0).replace_source_output(within(data, indices, int(node.get_attributes()["axis"])))


def within(data: Any, indices: Any, along: int) -> Any:
    """The data of a GatherElements, cut to its indices, which may be shorter on the axes that they do not go along.
    OpenVINO then reads memory of others, or fails. (It takes a Slice away again, and no Gather.)"""
    from openvino import opset15 as op

    mine, theirs = data.get_partial_shape(), indices.get_partial_shape()
    rank = mine.rank if mine.rank.is_static else theirs.rank
    for axis in range(rank.get_length() if rank.is_static else 0):
        fixed = mine.rank.is_static and theirs.rank.is_static and mine[axis].is_static
        if axis != along % rank.get_length() and not (fixed and mine[axis] == theirs[axis]):
            none, one, place = (op.constant(np.int64(i)) for i in (0, 1, axis))
            rows = op.gather(op.shape_of(indices, "i64"), place, none)
            data = op.gather(data, op.range(none, rows, one, "i64"), place).output(0)
    return data


def _split_unevenly(node: Any) -> None:
    from openvino import opset15 as op

    if node.get_type_name() != "Split":
        return
    data, axis, parts = node.input_value(0), node.input_value(1), node.get_output_size()
    made = op.variadic_split(data, axis, even_lengths(data, axis, parts))
    for old, new in zip(node.outputs(), made.outputs(), strict=True):
        old.replace(new)


def even_lengths(data: Any, axis: Any, parts: int) -> Any:
    """The lengths of a Split that states none: ONNX's last part is smaller where the axis does not divide. OpenVINO's
    own Split then fails."""
    from openvino import opset15 as op

    count = op.constant(np.int64(parts))
    whole = op.reshape(op.gather(op.shape_of(data, "i64"), axis, op.constant(np.int64(0))), op.constant([1]), False)
    length = op.divide(op.add(whole, op.constant(np.int64(parts - 1))), count)
    starts, ends = (op.multiply(op.constant(np.arange(i, i + parts)), length) for i in (0, 1))
    return op.subtract(op.minimum(ends, whole), op.minimum(starts, whole))


def blamed_operators(error: EngineError) -> frozenset[str]:
    """The operators that the frontend's message names: `Scan-24` is `Scan`."""
    return frozenset(re.findall(r"\b([A-Z]\w+)-\d+", error.cause))


def unknown_rank(output: Any) -> bool:
    """Whether the number of axes of a value is not known before it is computed: the CPU plug-in compiles no such
    graph."""
    return bool(output.get_partial_shape().rank.is_dynamic)


def folded(lowered: Node) -> Array | None:
    """The content of a small tensor of integers that is computed from constants alone; None for any other value."""
    import openvino as ov

    kind = lowered.get_element_type() if hasattr(lowered, "get_output_element_type") else lowered.element_type
    shape = _dimensions(lowered)
    if kind.to_string() not in ("i32", "i64") or shape is None or any(d is None or d > 64 for d in shape):
        return None
    output = lowered if isinstance(lowered, ov.Output) else lowered.output(0)
    if output.get_node().get_type_name() == "Constant":
        return np.array(output.get_node().data)
    waiting, seen = [output.get_node()], set[str]()
    while waiting:
        node = waiting.pop()
        if node.get_type_name() == "Parameter" or len(seen) > FOLDED_NODES:
            return None
        if node.get_name() not in seen:
            seen.add(node.get_name())
            waiting += [i.get_source_output().get_node() for i in node.inputs()]
    from openvino.passes import ConstantFolding, Manager

    small = ov.Model([output], [], "constant").clone()
    manager = Manager()
    manager.register_pass(ConstantFolding())
    manager.run_passes(small)
    found = small.get_results()[0].input_value(0).get_node()
    return np.array(found.data) if found.get_type_name() == "Constant" else None


def _dimensions(lowered: Node) -> list[int | None] | None:
    shape = lowered.get_partial_shape() if hasattr(lowered, "get_output_partial_shape") else lowered.partial_shape
    if shape.rank.is_dynamic:
        return None
    return [d.get_length() if d.is_static else None for d in shape]
