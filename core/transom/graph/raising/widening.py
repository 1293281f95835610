"""Widens activations to float32: a 16-bit decoder graph keeps its 16-bit weights and computes in float32."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from transom.graph.editing import Editor, all_nodes

HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_LOWEST = np.float32(np.finfo(np.float32).max)
_FLOAT = int(ir.DataType.FLOAT)


def widen(model: ir.Model) -> bool:
    """Compute in float32 what the model computes in float16 or bfloat16, in place. Returns whether anything changed."""
    graph = model.graph
    halves = [v for v in graph.initializers.values() if v.dtype in HALVES]
    inputs = [v for v in graph.inputs if v.dtype in HALVES]
    if not halves and not inputs:
        return False
    editor = Editor(model)
    for value in inputs:
        value.type = ir.TensorType(ir.DataType.FLOAT)
    for node in list(all_nodes(graph)):
        _widen_node(node)
    for value in halves:
        _widen_weight(editor, value)
    for node in graph:
        for value in node.outputs:
            if value.dtype in HALVES:
                value.type = ir.TensorType(ir.DataType.FLOAT)
    editor.finish_edit()
    return True


def _widen_node(node: ir.Node) -> None:
    if node.op_type in ("Cast", "DequantizeLinear", "EyeLike", "RandomNormalLike", "RandomUniformLike", "Bernoulli"):
        name = {"Cast": "to", "DequantizeLinear": "output_dtype"}.get(node.op_type, "dtype")
        if node.attributes.get_int(name, 0) in [int(d) for d in HALVES]:
            node.attributes[name] = ir.AttrInt64(name, _FLOAT)
    elif node.op_type == "ConstantOfShape" and "value" in node.attributes:
        tensor = node.attributes["value"].as_tensor()
        if tensor.dtype in HALVES:
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(tensor.numpy().astype(np.float32)))
    if node.op_type == "DequantizeLinear" and node.inputs[1] is not None and node.inputs[1].dtype in HALVES:
        node.attributes["output_dtype"] = ir.AttrInt64("output_dtype", _FLOAT)


def _widen_weight(editor: Editor, value: ir.Value) -> None:
    """Cast the weight where it is used; scales of a `DequantizeLinear` are not cast."""
    uses = [(node, i) for node, i in value.uses() if not (node.op_type == "DequantizeLinear" and i == 1)]
    if not uses:
        return
    tensor = value.const_value
    assert tensor is not None
    if tensor.size == 1:
        number = np.asarray(tensor.numpy(), np.float32)
        if tensor.dtype == ir.DataType.FLOAT16 and abs(float(number.reshape(-1)[0])) >= 65504:  # stands for infinity
            number = np.copysign(_LOWEST, number)
        wide = editor.constant(np.asarray(number, np.float32), f"{value.name}.float32")
    else:
        wide = editor.op("Cast", value, to=_FLOAT, name=f"{value.name}.float32")
        wide.type, wide.shape = ir.TensorType(ir.DataType.FLOAT), value.shape
    for node, index in uses:
        node.replace_input_with(index, wide)
