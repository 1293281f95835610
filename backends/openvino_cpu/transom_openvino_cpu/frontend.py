"""OpenVINO's ONNX frontend, for ONNX operators that decoders do not need and for graphs with control flow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from transom.errors import EngineError, message_lines
from transom.graph.reading import constant_of

if TYPE_CHECKING:
    import onnx_ir as ir

Node = Any

OPERATORS = frozenset({
    "Acos", "Acosh", "ArgMax", "ArgMin", "Asin", "Asinh", "Atan", "Atanh", "Attention", "AveragePool",
    "BatchNormalization", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "CastLike", "Celu",
    "Clip", "ConstantOfShape", "Conv", "ConvTranspose", "Cosh", "CumSum", "DepthToSpace", "Einsum", "Elu", "EyeLike",
    "Flatten", "GRU", "GatherElements", "GatherND", "Gemm", "GlobalAveragePool", "GlobalMaxPool",
    "GroupNormalization", "HardSigmoid", "HardSwish", "Hardmax", "InstanceNormalization", "IsInf", "IsNaN", "LRN",
    "LSTM", "LayerNormalization", "LeakyRelu", "LogSoftmax", "LpNormalization", "Max", "MaxPool", "Mean",
    "MeanVarianceNormalization", "Min", "Mish", "Mod", "NonZero", "OneHot", "PRelu", "Pad", "Pow", "QuantizeLinear",
    "Range", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin",
    "ReduceProd", "ReduceSum", "ReduceSumSquare", "Resize", "Round", "ScatterElements", "ScatterND", "Selu", "Shrink",
    "Sinh", "Size", "Softsign", "SpaceToDepth", "Sum", "Tan", "ThresholdedRelu", "Tile", "TopK", "Trilu",
})  # fmt: skip
"""Operators that this backend converts with the frontend of OpenVINO 2026.4, at opset 24."""

CONTROL_FLOW = frozenset({"If", "Loop", "Scan"})
"""Claimed only in graphs that the frontend reads as a whole."""

SMALL = 4096
"""Constants of up to this many bytes are passed to the frontend by value, since it needs axes and shapes."""

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
    for parameter, lowered in zip(read.get_parameters(), given, strict=True):
        parameter.output(0).replace(lowered)
    return [result.input_value(0) for result in read.get_results()]


def _dimensions(lowered: Node) -> list[int | None] | None:
    shape = lowered.get_partial_shape() if hasattr(lowered, "get_output_partial_shape") else lowered.partial_shape
    if shape.rank.is_dynamic:
        return None
    return [d.get_length() if d.is_static else None for d in shape]
