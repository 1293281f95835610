"""Reads a neutral graph: the weight behind a value, the content of a constant, the attributes of a node.

Backends use these functions to keep quantized weights compressed. They work on graphs that Transom built and on graphs
read from ONNX files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np
import onnx_ir as ir

from transom.graph.builder import WEIGHT_META
from transom.graph.weights import (
    DENSE_DTYPES,
    UNPACKED,
    Array,
    Blocked,
    BlockedArrays,
    BlockedDtype,
    Dense,
    Weight,
)
from transom.ops import find

if TYPE_CHECKING:
    from transom.graph.graph import Graph

_BLOCKED: dict[ir.DataType, BlockedDtype] = {
    ir.DataType.INT4: "int4",
    ir.DataType.UINT4: "uint4",
    ir.DataType.INT8: "int8",
    ir.DataType.UINT8: "uint8",
    ir.DataType.FLOAT8E4M3FN: "float8e4m3fn",
}
_DENSE = {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16"}


def attributes_of(node: ir.Node) -> dict[str, Any]:
    """A node's attributes as Python values: tensors as NumPy arrays, subgraphs as `ir.Graph`. Defaults are filled in
    for operators outside ONNX's own domains."""
    result: dict[str, Any] = {}
    for name, attribute in node.attributes.items():
        if attribute.type == ir.AttributeType.TENSOR:
            result[name] = attribute.as_tensor().numpy()
        else:
            result[name] = attribute.value
    schema = find(node.domain, node.op_type)
    if schema is not None and node.domain not in ("", "ai.onnx.ml"):
        result = schema.attributes_with_defaults(result)
    return result


def constant_of(value: ir.Value | None) -> Array | None:
    """The array of an initializer or a `Constant` node; None if the value is computed."""
    if value is None:
        return None
    if value.const_value is not None:
        return value.const_value.numpy()
    node = value.producer()
    if node is not None and node.op_type == "Constant" and not node.domain:
        for name in ("value", "value_int", "value_ints", "value_float", "value_floats"):
            if name in node.attributes:
                attribute = node.attributes[name]
                if name == "value":
                    return attribute.as_tensor().numpy()
                return np.asarray(attribute.value, np.int64 if "int" in name else np.float32)
    return None


def weight_of(value: ir.Value | None) -> Weight | None:
    """The weight behind a value, looking through block dequantization, added minimums and casts to float32, or None.

    The pattern is the one `GraphBuilder.weight` writes: `DequantizeLinear(block_size)` along the last axis of a matrix,
    then optionally Reshape to [N, K / block, block], Add of [N, K / block, 1], Reshape to [N, K].
    """
    if value is None:
        return None
    if value.const_value is not None:
        return _initializer(value)
    node = value.producer()
    if node is None or node.domain:
        return None
    if node.op_type == "Identity" or (node.op_type == "Cast" and node.attributes.get_int("to", 0) == ir.DataType.FLOAT):
        return weight_of(node.inputs[0])
    if node.op_type == "DequantizeLinear":
        return _dequantized(node)
    if node.op_type == "Reshape":
        return _with_minimums(node)
    return None


def _initializer(value: ir.Value) -> Weight | None:
    original = value.meta.get(WEIGHT_META)
    if isinstance(original, Dense):
        return original
    tensor = value.const_value
    assert tensor is not None
    dtype = _DENSE.get(tensor.dtype)
    if dtype is None:
        return None
    shape = tuple(int(d) for d in tensor.shape.numpy())
    return Dense(shape, cast(Any, dtype), lambda: tensor.numpy().view(DENSE_DTYPES[dtype]))


def _dequantized(node: ir.Node) -> Weight | None:
    quants, scales = node.inputs[0], node.inputs[1]
    zeros = node.inputs[2] if len(node.inputs) > 2 else None
    if quants is None or scales is None or quants.const_value is None or scales.const_value is None:
        return None
    original = quants.meta.get(WEIGHT_META)
    if isinstance(original, Blocked):
        if not original.has_minimums:
            return original
        inner = original.load

        def without_minimums() -> BlockedArrays:
            return inner()._replace(minimums=None)

        return Blocked(
            original.shape,
            original.block,
            original.dtype,
            original.scale_dtype,
            without_minimums,
            has_zero_points=original.has_zero_points,
        )
    tensor, scale = quants.const_value, scales.const_value
    attributes = attributes_of(node)
    block, axis = int(attributes.get("block_size", 0)), int(attributes.get("axis", 1))
    shape = tuple(int(d) for d in tensor.shape.numpy())
    if tensor.dtype not in _BLOCKED or scale.dtype not in _DENSE or len(shape) != 2 or not block or axis % 2 != 1:
        return None
    if shape[1] % block or scale.dtype == ir.DataType.BFLOAT16:
        return None
    if zeros is not None and zeros.const_value is None:
        return None
    if tuple(scale.shape.numpy()) != (shape[0], shape[1] // block):
        return None
    zero = None if zeros is None else zeros.const_value
    dtype = _BLOCKED[tensor.dtype]
    plain = UNPACKED[dtype]

    def load() -> BlockedArrays:
        zero_points = None if zero is None else zero.numpy().astype(plain)
        return BlockedArrays(tensor.numpy().astype(plain), scale.numpy(), None, zero_points)

    return Blocked(
        (shape[0], shape[1]), block, dtype, cast(Any, _DENSE[scale.dtype]), load, has_zero_points=zero is not None
    )


def _with_minimums(node: ir.Node) -> Weight | None:
    """The weight behind the last node of Reshape, Add, Reshape: a block-quantized matrix with minimums, or None."""
    add = _producer(node.inputs[0], "Add")
    split = None if add is None else _producer(add.inputs[0], "Reshape")
    source = None if split is None else _producer(split.inputs[0], "DequantizeLinear")
    if add is None or split is None or source is None or source.inputs[0] is None:
        return None
    blocks, minimums = _dequantized(source), weight_of(add.inputs[1])
    if not isinstance(blocks, Blocked) or not isinstance(minimums, Dense):
        return None
    rows, columns = blocks.shape
    count = columns // blocks.block
    if minimums.shape != (rows, count, 1) or minimums.dtype != blocks.scale_dtype:
        return None
    if not _reshapes_to(split, (rows, count, blocks.block)) or not _reshapes_to(node, (rows, columns)):
        return None
    original = source.inputs[0].meta.get(WEIGHT_META)
    if isinstance(original, Blocked) and original.has_minimums:
        return original
    inner, shift = blocks.load, minimums.load

    def load() -> BlockedArrays:
        return inner()._replace(minimums=shift().reshape(rows, -1))

    return Blocked(blocks.shape, blocks.block, blocks.dtype, blocks.scale_dtype, load, True, blocks.has_zero_points)


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and not node.domain and node.op_type == op_type else None


def _reshapes_to(node: ir.Node, shape: tuple[int, ...]) -> bool:
    target = constant_of(node.inputs[1])
    return target is not None and tuple(target.reshape(-1).tolist()) == shape


def element_type(value: ir.Value | None) -> ir.DataType | None:
    """The element type of a value. If the value states none, follows casts and dequantization back to the weight."""
    if value is None:
        return None
    if value.const_value is not None:
        return value.const_value.dtype
    if value.dtype is not None:
        return value.dtype
    node = value.producer()
    if node is None or node.domain:
        return None
    if node.op_type == "Cast":
        return ir.DataType(node.attributes.get_int("to", 0))
    if node.op_type == "DequantizeLinear":
        stated = node.attributes.get_int("output_dtype", 0)
        return ir.DataType(stated) if stated else element_type(node.inputs[1])
    return element_type(node.inputs[0]) if node.op_type in ("Identity", "Reshape", "Add") else None


def matrices(graph: Graph) -> list[Weight]:
    """The weight of each matrix product of a graph, in execution order; a shared weight appears once per product."""
    return [w for n in graph.nodes() if (w := linear_weight(n)) is not None]


def linear_weight(node: ir.Node) -> Weight | None:
    """The weight [out, in] of `MatMul(x, Transpose(weight))`; None for any other node."""
    if node.op_type != "MatMul" or node.domain or node.inputs[1] is None:
        return None
    transpose = node.inputs[1].producer()
    if transpose is None or transpose.op_type != "Transpose" or transpose.domain:
        return None
    weight = weight_of(transpose.inputs[0])
    if weight is None or len(weight.shape) != 2:
        return None
    perm = transpose.attributes.get("perm")
    return weight if perm is None or list(perm.as_ints()) == [1, 0] else None


_ELEMENTWISE = ("Add", "Cast", "Div", "Identity", "Mul", "Tanh")
"""Operators allowed between the vocabulary product and the logits: biases, scales, soft caps."""


def vocabulary_products(graph: Graph) -> frozenset[str]:
    """The products that compute the logits, apart from elementwise operators after them. Their rounding affects the
    logits directly. Empty for a graph that is not a decoder."""
    values = [v for v in graph.model.graph.outputs if v.name == "logits"] if graph.decoder is not None else []
    found: set[str] = set()
    while values:
        node = values.pop().producer()
        if node is None:
            continue
        if linear_weight(node) is not None:
            found.add(str(node.name))
        elif node.op_type in _ELEMENTWISE and not node.domain:
            values += [v for v in node.inputs if v is not None]
    return frozenset(found)
