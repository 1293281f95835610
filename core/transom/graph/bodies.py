"""Finds the function body of a node: in the graph, in the operator registry, or in ONNX.

A model-local function takes precedence. Operators of the registry generate their own bodies. ONNX defines many of its
own operators (RMSNormalization, RotaryEmbedding, Attention, Swish, Softmax …) in terms of simpler ones.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from transom.ops import find
from transom.ops.functions import OPSET


def body_of(model: ir.Model, node: ir.Node) -> ir.Function | None:
    """The node's body, or None. A body that is not a function of the model is specialized to the node's attributes and
    inputs."""
    own = model.functions.get(node.op_identifier())
    if own is not None:
        return own
    schema = find(node.domain, node.op_type)
    if schema is None:
        return None
    if schema.body is not None:
        from transom.graph.reading import attributes_of

        return schema.body(attributes_of(node), tuple(v is not None for v in node.inputs))
    return _body_in_onnx(node) if node.domain in ("", "ai.onnx") else None


def has_body(model: ir.Model, node: ir.Node) -> bool:
    """Whether `transom.graph.passes.decompose` can replace the node."""
    if node.op_identifier() in model.functions:
        return True
    schema = find(node.domain, node.op_type)
    if schema is None or node.domain not in ("", "ai.onnx"):
        return schema is not None and schema.body is not None
    if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
        return False  # onnx_ir inlines no function that takes a graph
    import onnx

    theirs: Any = onnx.defs.get_schema(node.op_type, OPSET, "")
    if not theirs.has_function and not theirs.has_context_dependent_function:
        return False
    if any(v is not None and v.dtype is None for v in node.inputs):
        return True  # decompose infers the types, which such bodies depend on
    return _body_in_onnx(node) is not None


def _body_in_onnx(node: ir.Node) -> ir.Function | None:
    import onnx

    schema: Any = onnx.defs.get_schema(node.op_type, OPSET, "")
    if schema.has_context_dependent_function:
        types = []
        for value in node.inputs:
            proto = onnx.TypeProto()
            if value is not None:
                if value.dtype is None:
                    return None  # ONNX generates this body only for known element types
                proto.CopyFrom(ir.to_proto(value).type)
            types.append(proto.SerializeToString())
        version = max(v for v in schema.context_dependent_function_opset_versions if v <= OPSET)
        data = schema.get_context_dependent_function_with_opset_version(
            version, ir.to_proto(node).SerializeToString(), types
        )
    elif schema.has_function:
        version = max(v for v in schema.function_opset_versions if v <= OPSET)
        data = schema.get_function_with_opset_version(version)
    else:
        return None
    if not data:
        return None
    proto = onnx.FunctionProto.FromString(data)
    for imported in proto.opset_import:  # older bodies use only operators that mean the same in our opset
        if imported.domain == "":
            imported.version = OPSET
    made = {output for inner in proto.node for output in inner.output} | set(proto.input)
    kept = [name for name in proto.output[: len(node.outputs)] if name in made]  # optional outputs may be missing
    if len(kept) < len(node.outputs):
        return None
    del proto.output[:]
    proto.output.extend(kept)
    body = ir.from_proto(proto)
    assert isinstance(body, ir.Function)
    for name, formal in schema.attributes.items():  # the body refers to all of them
        if name in body.attributes and body.attributes[name].value is None and formal.default_value.name:
            body.attributes[name] = ir.from_proto(formal.default_value)
    return body
