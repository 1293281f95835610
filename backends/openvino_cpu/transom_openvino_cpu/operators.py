"""Lowering table: one function per ONNX operator, from a node and its lowered inputs to OpenVINO outputs.

ONNX operators without a function here are converted node by node by OpenVINO's ONNX frontend (`frontend`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from transom.graph.reading import constant_of, weight_of
from transom.graph.weights import Array, Blocked, Dense
from transom_openvino_cpu.frontend import bounded, even_lengths, within
from transom_openvino_cpu.weights import constant, dense, rows_of

if TYPE_CHECKING:
    import onnx_ir as ir

    from transom_openvino_cpu.lowering import StageWriter

Node = Any
Attributes = Mapping[str, Any]
Lower = Callable[["StageWriter", "ir.Node", Attributes], list[Node]]

TABLE: dict[str, Lower] = {}
ELEMENT_TYPES = {
    1: np.float32, 2: np.uint8, 3: np.int8, 5: np.int16, 6: np.int32, 7: np.int64, 9: np.bool_, 10: np.float16,
    11: np.float64, 12: np.uint32, 13: np.uint64,
}  # fmt: skip
"""ONNX element types that a cast may produce."""


def lowers(*op_types: str) -> Callable[[Lower], Lower]:
    def add(function: Lower) -> Lower:
        TABLE.update(dict.fromkeys(op_types, function))
        return function

    return add


def _op() -> Any:
    from openvino import opset13

    return opset13


def ints(values: Any) -> Node:
    return _op().constant(np.asarray(values, np.int64))


def _like(value: float, node: Node) -> Node:
    """A constant of a lowered value's element type."""
    number = _op().constant(np.float32(value))
    kind = node.get_element_type()
    return number if kind.to_string() == "f32" else _op().convert(number, kind.to_string())


def _floating(node: Node) -> bool:
    return bool(node.get_element_type().is_real())


# elementwise ----------------------------------------------------------------------------------------------------------
_UNARY = {
    "Abs": "absolute", "Ceil": "ceiling", "Cos": "cos", "Erf": "erf", "Exp": "exp", "Floor": "floor", "Log": "log",
    "Neg": "negative", "Not": "logical_not", "Relu": "relu", "Sigmoid": "sigmoid", "Sign": "sign", "Sin": "sin",
    "Softplus": "softplus", "Sqrt": "sqrt", "Tanh": "tanh",
}  # fmt: skip
_BINARY = {
    "Add": "add", "And": "logical_and", "Equal": "equal", "Greater": "greater", "GreaterOrEqual": "greater_equal",
    "Less": "less", "LessOrEqual": "less_equal", "Mul": "multiply", "Or": "logical_or", "Sub": "subtract",
    "Xor": "logical_xor",
}  # fmt: skip


@lowers(*_UNARY)
def _unary(w: StageWriter, node: ir.Node, attributes: Attributes) -> list[Node]:
    return [getattr(_op(), _UNARY[node.op_type])(w.get(node.inputs[0]))]


@lowers(*_BINARY)
def _binary(w: StageWriter, node: ir.Node, attributes: Attributes) -> list[Node]:
    return [getattr(_op(), _BINARY[node.op_type])(w.get(node.inputs[0]), w.get(node.inputs[1]))]


@lowers("Div")
def _div(w: StageWriter, node: ir.Node, attributes: Attributes) -> list[Node]:
    a, b = w.get(node.inputs[0]), w.get(node.inputs[1])
    if not _floating(a):
        return w.through_frontend(node)  # integer division truncates
    return [_op().divide(a, b)]


@lowers("Reciprocal")
def _reciprocal(w: StageWriter, node: ir.Node, attributes: Attributes) -> list[Node]:
    x = w.get(node.inputs[0])
    return [_op().divide(_like(1, x), x)]


@lowers("Identity")
def _identity(w: StageWriter, node: ir.Node, attributes: Attributes) -> list[Node]:
    return [w.get(node.inputs[0])]


@lowers("Swish")
def _swish(w: StageWriter, node: ir.Node, attributes: Attributes) -> list[Node]:
    alpha = float(attributes.get("alpha", 1.0))
    x = w.get(node.inputs[0])
    return [_op().swish(x) if alpha == 1.0 else _op().swish(x, _like(alpha, x))]


@lowers("Gelu")
def _gelu(w: StageWriter, node: ir.Node, attributes: Attributes) -> list[Node]:
    form = "tanh" if attributes.get("approximate", "none") == "tanh" else "erf"
    return [_op().gelu(w.get(node.inputs[0]), form)]


@lowers("Softmax")
def _softmax(w: StageWriter, node: ir.Node, attributes: Attributes) -> list[Node]:
    return [_op().softmax(w.get(node.inputs[0]), int(attributes.get("axis", -1)))]


@lowers("Where")
def _where(w: StageWriter, node: ir.Node, attributes: Attributes) -> list[Node]:
    return [_op().select(*(w.get(v) for v in node.inputs))]


@lowers("Cast")
def _cast(w: StageWriter, node: ir.Node, attributes: Attributes) -> list[Node]:
    import openvino as ov

    to = int(attributes["to"])
    x = w.get(node.inputs[0])
    if to == 16:
        return [_op().convert(x, ov.Type.bf16)]
    if to == 9 and x.get_element_type() != ov.Type.boolean:
        return [_op().not_equal(x, _op().convert(_op().constant(np.int8(0)), x.get_element_type()))]  # NaN is true
    if to == 7 and x.get_element_type() in (ov.Type.f32, ov.Type.bf16):
        x = bounded(x)
    return [_op().convert(x, ELEMENT_TYPES[to])]


# shapes ---------------------------------------------------------------------------------------------------------------
@lowers("Constant")
def _constant(w: StageWriter, node: ir.Node, attributes: Attributes) -> list[Node]:
    array = constant_of(node.outputs[0])
    return w.through_frontend(node) if array is None else [constant(array)]


@lowers("Reshape")
def _reshape(w: StageWriter, node: ir.Node, attributes: Attributes) -> list[Node]:
    copies_zeros = not attributes.get("allowzero", 0)
    return [_op().reshape(w.get(node.inputs[0]), w.get(node.inputs[1]), copies_zeros)]


@lowers("Transpose")
def _transpose(w: StageWriter, node: ir.Node, attributes: Attributes) -> list[Node]:
    x = w.get(node.inputs[0])
    perm = attributes.get("perm")
    if perm is None:
        if x.get_partial_shape().rank.is_dynamic:
            return w.through_frontend(node)
        perm = list(range(x.get_partial_shape().rank.get_length()))[::-1]
    return [_op().transpose(x, ints(list(perm)))]


@lowers("Unsqueeze")
def _unsqueeze(w: StageWriter, node: ir.Node, attributes: Attributes) -> list[Node]:
    return [_op().unsqueeze(w.get(node.inputs[0]), w.get(node.inputs[1]))]


@lowers("Squeeze")
def _squeeze(w: StageWriter, node: ir.Node, attributes: Attributes) -> list[Node]:
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    if axes is None:
        return w.through_frontend(node)
    return [_op().squeeze(w.get(node.inputs[0]), w.get(axes))]


@lowers("Concat")
def _concat(w: StageWriter, node: ir.Node, attributes: Attributes) -> list[Node]:
    return [_op().concat([w.get(v) for v in node.inputs], int(attributes["axis"]))]


@lowers("Slice")
def _slice(w: StageWriter, node: ir.Node, attributes: Attributes) -> list[Node]:
    data, start, stop, *rest = (None if v is None else w.get(v) for v in node.inputs)
    axes, steps = ([*rest, None, None])[:2]
    if steps is None:
        first = constant_of(node.inputs[1])
        if first is None:
            return w.through_frontend(node)
        steps = ints([1] * first.size)
    return [_op().slice(data, start, stop, steps, *([] if axes is None else [axes]))]


@lowers("Split")
def _split(w: StageWriter, node: ir.Node, attributes: Attributes) -> list[Node]:
    op, data, axis = _op(), w.get(node.inputs[0]), ints(int(attributes.get("axis", 0)))
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        return list(op.variadic_split(data, axis, w.get(node.inputs[1])).outputs())
    return list(op.variadic_split(data, axis, even_lengths(data, axis, len(node.outputs))).outputs())


@lowers("Expand")
def _expand(w: StageWriter, node: ir.Node, attributes: Attributes) -> list[Node]:
    return [_op().broadcast(w.get(node.inputs[0]), w.get(node.inputs[1]), broadcast_spec="BIDIRECTIONAL")]


@lowers("Shape")
def _shape(w: StageWriter, node: ir.Node, attributes: Attributes) -> list[Node]:
    shape = _op().shape_of(w.get(node.inputs[0]), "i64")
    start, end = int(attributes.get("start", 0)), attributes.get("end")
    if start or end is not None:
        shape = _op().slice(shape, ints([start]), ints([2**31 - 1 if end is None else int(end)]), ints([1]), ints([0]))
    return [shape]


@lowers("Gather")
def _gather(w: StageWriter, node: ir.Node, attributes: Attributes) -> list[Node]:
    axis = int(attributes.get("axis", 0))
    weight = weight_of(node.inputs[0]) if axis == 0 else None
    ids = node.inputs[1]
    if isinstance(weight, Blocked | Dense) and len(weight.shape) == 2 and constant_of(ids) is None:
        indices = w.get(ids)
        if indices.get_partial_shape().rank.get_length() == 1:
            return [rows_of(weight, indices)]
        found = rows_of(weight, _op().reshape(indices, ints([-1]), False))
        shape = _op().concat([_op().shape_of(indices, "i64"), ints([weight.shape[1]])], 0)
        return [_op().reshape(found, shape, False)]
    return [_op().gather(w.get(node.inputs[0]), w.get(ids), ints(axis))]


@lowers("GatherElements")
def _gather_elements(w: StageWriter, node: ir.Node, attributes: Attributes) -> list[Node]:
    data, indices, axis = w.get(node.inputs[0]), w.get(node.inputs[1]), int(attributes.get("axis", 0))
    return [_op().gather_elements(within(data, indices, axis), indices, axis)]


# operators of decoders -----------------------------------------------------------------------------------------------
@lowers("MatMul")
def _matmul(w: StageWriter, node: ir.Node, attributes: Attributes) -> list[Node]:
    fused = w.linear(node)
    if fused is not None:
        return [fused]
    return [_op().matmul(w.get(node.inputs[0]), w.get(node.inputs[1]), False, False)]


@lowers("RMSNormalization")
def _rms(w: StageWriter, node: ir.Node, attributes: Attributes) -> list[Node]:
    op = _op()
    x, scale = w.get(node.inputs[0]), w.get(node.inputs[1])
    rank = x.get_partial_shape().rank.get_length()
    axes = list(range(int(attributes.get("axis", -1)) % rank, rank))
    mean = op.reduce_mean(op.multiply(x, x), ints(axes), True)
    root = op.sqrt(op.add(mean, op.constant(np.float32(attributes.get("epsilon", 1e-5)))))
    inverse = op.divide(op.constant(np.float32(1)), root)
    return [op.multiply(op.multiply(x, inverse), scale)]


@lowers("RotaryEmbedding")
def _rotary(w: StageWriter, node: ir.Node, attributes: Attributes) -> list[Node]:
    """Written exactly as `x * [cos, cos] + [-x2, x1] * [sin, sin]` with rank 4. The CPU plug-in fuses this form into
    one operator with float32 tables (its pass RoPEFusionGPTNEOX), which makes a decode step 10 % faster."""
    op = _op()
    packed = _packed_tokens(node)
    if packed is not None and w.get(packed[0]).get_partial_shape().rank.get_length() != 2:
        packed = None
    x = w.get(node.inputs[0] if packed is None else packed[0])
    cos, sin = w.get(node.inputs[1]), w.get(node.inputs[2])
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        ids = w.get(node.inputs[3])
        cos, sin = (op.gather(t, ids, ints(0)).output(0) for t in (cos, sin))
    shape = x.get_partial_shape()
    half = cos.get_partial_shape()[2].get_length()
    flat = shape.rank.get_length() < 4
    if flat:
        heads = int(attributes["num_heads"])
        width = shape[shape.rank.get_length() - 1].get_length()
        dim = width // heads
        four = op.reshape(x, ints([-1, heads, 1, dim]), False)  # each token is a batch of one position
    else:
        dim, four = shape[3].get_length(), x
    rotated = int(attributes.get("rotary_embedding_dim", 0)) or dim
    interleaved = bool(attributes.get("interleaved", 0))

    def table(values: Node) -> Node:
        twice = op.concat([values, values], -1)
        return op.reshape(twice, ints([-1, 1, 1, 2 * half]), False) if flat else op.unsqueeze(twice, ints([1]))

    rest = None
    if rotated != dim:
        four, rest = op.variadic_split(four, ints(3), ints([rotated, dim - rotated])).outputs()
    order = np.arange(rotated).reshape(-1, 2).T.reshape(-1)  # deinterleave: first elements of all pairs, then second
    if interleaved:
        four = op.gather(four, ints(order), ints(3))
    a, b = op.variadic_split(four, ints(3), ints([rotated // 2, rotated // 2])).outputs()
    turned = op.concat([op.multiply(b, op.constant(np.float32(-1))), a], -1)
    result = op.add(op.multiply(four, table(cos)), op.multiply(turned, table(sin)))
    if interleaved:
        result = op.gather(result, ints(np.argsort(order)), ints(3))
    if rest is not None:
        result = op.concat([result, rest], -1)
    if packed is not None:
        result = op.reshape(result, ints([-1, width]), False)
        for squeeze in packed[1]:
            w.skip(squeeze, result)
        return [op.unsqueeze(result, ints([0]))]
    if not flat:
        return [result]
    if shape[0].is_static:
        return [op.reshape(result, ints([shape[0].get_length(), -1, width]), False)]
    return [op.reshape(result, op.shape_of(x, "i64"), False)]


def _packed_tokens(node: ir.Node) -> tuple[ir.Value, list[ir.Node]] | None:
    """For a rotation of packed tokens with a batch axis of one: the tokens [tokens, width] before the axis was added,
    and the nodes that remove it. None for any other rotation."""
    unsqueeze = node.inputs[0].producer() if node.inputs[0] is not None else None
    uses = [user for user, _ in node.outputs[0].uses()]
    if unsqueeze is None or unsqueeze.op_type != "Unsqueeze" or node.outputs[0].is_graph_output():
        return None
    if any(n.domain or n.op_type != "Squeeze" for n in uses) or not _along_first([unsqueeze, *uses]):
        return None
    tokens = unsqueeze.inputs[0]
    return None if tokens is None else (tokens, uses)


def _along_first(nodes: Sequence[ir.Node]) -> bool:
    """Whether each node adds or removes only the first axis."""
    axes = [constant_of(n.inputs[1]) if len(n.inputs) > 1 else None for n in nodes]
    return all(a is not None and a.reshape(-1).tolist() == [0] for a in axes)


@lowers("DequantizeLinear")
def _dequantize(w: StageWriter, node: ir.Node, attributes: Attributes) -> list[Node]:
    op = _op()
    block, axis = int(attributes.get("block_size", 0)), int(attributes.get("axis", 1))
    wanted = int(attributes.get("output_dtype", 0))
    x, scale = w.get(node.inputs[0]), w.get(node.inputs[1])
    zero = w.get(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else None
    kind = scale.get_element_type()
    shape = [d.get_length() for d in x.get_partial_shape()]
    axis %= max(len(shape), 1)
    wide: Node = op.convert(x, np.float32)
    spread: list[int] | None = None
    if block:
        wide = op.reshape(wide, ints([*shape[:axis], shape[axis] // block, block, *shape[axis + 1 :]]), False)
        spread = [*shape[:axis], shape[axis] // block, 1, *shape[axis + 1 :]]
    elif scale.get_partial_shape().rank.get_length() == 1 and len(shape) > 1:
        spread = [1] * len(shape)
        spread[axis] = -1

    def fitted(node: Node) -> Node:
        node = op.convert(node, np.float32)
        return node if spread is None else op.reshape(node, ints(spread), False)

    if zero is not None:
        wide = op.subtract(wide, fitted(zero))
    wide = op.multiply(wide, fitted(scale))
    if block:
        wide = op.reshape(wide, ints(shape), False)
    if wanted not in (0, 1):
        return [op.convert(wide, ELEMENT_TYPES[wanted])]
    return [wide if wanted or kind.to_string() == "f32" else op.convert(wide, kind)]


def initializer(value: ir.Value) -> Node:
    """A constant of the graph, unchanged."""
    weight = value.meta.get("transom.weight")
    if isinstance(weight, Dense) and weight.dtype == "float32":
        return dense(weight)
    tensor = value.const_value
    assert tensor is not None
    array: Array = tensor.numpy()
    return constant(array)
