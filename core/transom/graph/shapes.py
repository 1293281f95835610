"""Types and shapes of every value, by ONNX's own inference over the graph without its weights."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from transom.errors import SourceError
from transom.graph.graph import Graph


def infer_shapes(graph: Graph) -> None:
    """Set the type and shape of every value of the main graph that inference can find, in place of what it had.

    Raises:
        SourceError: the nodes contradict each other; the message names one.
    """
    import onnx

    for node in graph.model.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.type = value.shape = None
    try:
        inferred = onnx.shape_inference.infer_shapes(graph.structure(), strict_mode=True, data_prop=True)
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, RuntimeError) as e:
        raise SourceError(
            f"{graph.name} is not valid ONNX: {_last_line(e)}", "Export the model again, or get the file again"
        ) from e
    found: dict[str, Any] = {v.name: v for v in inferred.graph.value_info}
    for node in graph.model.graph:
        for value in node.outputs:
            proto = found.get(str(value.name))
            if proto is not None and proto.type.WhichOneof("value") is not None:
                value.type = ir.serde.deserialize_type_proto_for_type(proto.type)
                value.shape = ir.serde.deserialize_type_proto_for_shape(proto.type)


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
