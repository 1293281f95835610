"""Infers the type and shape of every value with ONNX's shape inference, without reading weights."""

from __future__ import annotations

from typing import Any

import onnx
import onnx_ir as ir

from transom.errors import SourceError, message_lines
from transom.graph.digest import SMALL
from transom.graph.graph import Graph
from transom.ops.functions import OPSET

_ERRORS = (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, RuntimeError, ValueError, TypeError)


def infer_shapes(graph: Graph) -> None:
    """Replace the type and shape of every value of the main graph by what inference finds.

    Raises:
        SourceError: nodes contradict each other; the message names one.
    """
    for node in graph.model.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.type = value.shape = None
    try:
        inferred = _inferred(graph.structure())
        onnx.checker.check_model(_with_shapes(inferred))
    except _ERRORS as e:
        raise SourceError(
            f"{graph.name} is not valid ONNX: {message_lines(e)[-1]}", "Export the model again, or get the file again"
        ) from e
    found: dict[str, Any] = {v.name: v for v in (*inferred.graph.value_info, *inferred.graph.output)}
    for node in graph.model.graph:
        for value in node.outputs:
            proto = found.get(str(value.name))
            if value.is_graph_output() and value.type is not None and value.shape is not None:
                continue
            if proto is not None and proto.type.WhichOneof("value") is not None:
                value.type = ir.serde.deserialize_type_proto_for_type(proto.type)
                value.shape = ir.serde.deserialize_type_proto_for_shape(proto.type)
                without_negative_dims(value)


def _with_shapes(structure: Any) -> Any:
    """A copy whose inputs and outputs have shapes, which the checker requires and does not compare."""
    copy = onnx.ModelProto()
    copy.CopyFrom(structure)
    for value in (*copy.graph.input, *copy.graph.output):
        if value.type.HasField("tensor_type") and not value.type.tensor_type.HasField("shape"):
            value.type.tensor_type.shape.SetInParent()
    return copy


def _inferred(structure: Any) -> Any:
    try:
        return onnx.shape_inference.infer_shapes(structure, strict_mode=True, data_prop=True)
    except ValueError:  # onnx's data propagation fails on some loops
        return onnx.shape_inference.infer_shapes(structure, strict_mode=True, data_prop=False)


def without_negative_dims(value: ir.Value) -> None:
    """Forget the dimensions of a value that are below zero: some exporters write -1 for one that is not known."""
    if value.shape is not None and any(isinstance(d, int) and d < 0 for d in value.shape):
        value.shape = ir.Shape([None if isinstance(d, int) and d < 0 else d for d in value.shape])


def infer_node(node: ir.Node) -> None:
    """Infer the unknown types and shapes of one standard operator's outputs from its inputs."""
    if node.domain or node.op_type in ("If", "Loop", "Scan") or all(v.shape is not None for v in node.outputs):
        return
    types: dict[str, Any] = {}
    data: dict[str, Any] = {}
    for value in node.inputs:
        if value is None:
            continue
        if value.type is None:
            return
        proto = ir.to_proto(value).type
        types[str(value.name)] = proto
        tensor = value.const_value
        if tensor is not None and tensor.nbytes <= SMALL and not isinstance(tensor, ir.LazyTensor):
            data[str(value.name)] = ir.to_proto(tensor)
    schema = onnx.defs.get_schema(node.op_type, OPSET, "")
    try:
        found = onnx.shape_inference.infer_node_outputs(
            schema, ir.to_proto(node), types, data, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=12
        )
    except _ERRORS:
        return  # inference over the whole graph reports what is wrong with the node
    for value in node.outputs:
        inferred = found.get(str(value.name))
        if inferred is not None and inferred.WhichOneof("value") is not None:
            value.type = ir.serde.deserialize_type_proto_for_type(inferred)
            value.shape = ir.serde.deserialize_type_proto_for_shape(inferred)
