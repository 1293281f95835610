"""Expands ONNX Runtime's `com.microsoft` operators into standard operators, so that files made for it run anywhere.

The semantics follow ONNX Runtime's `docs/ContribOperators.md`; tests compare each expansion with onnxruntime. Attention
operators become standard `Attention` (MatMul and Softmax if there are sinks). All rows of a batch must have the same
length; `GroupQueryAttention` computes the same when its past is as long as its inputs say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import numpy as np
import onnx_ir as ir

from transom.errors import UnsupportedError
from transom.graph.editing import Editor, all_nodes
from transom.graph.shapes import infer_node
from transom.graph.weights import Array, Blocked, BlockedArrays

DOMAIN = "com.microsoft"

Value = ir.Value
Expansion = Callable[[Editor, ir.Node, Mapping[str, Any]], Sequence[Value | None]]
"""(editor, node, attributes) -> a value for each output; None for an output that cannot be computed."""


def expand_contrib(model: ir.Model) -> None:
    """Replace every `com.microsoft` operator of the model, in place.

    Raises:
        UnsupportedError: a node, which the message names, has no expansion or uses an unsupported variant.
    """
    todo = [n for n in all_nodes(model.graph) if is_contrib(n) and n.op_identifier() not in model.functions]
    if not todo:
        return
    editor = Editor(model)
    waiting = {id(n) for n in todo}
    for node in [*model.graph, *(n for n in todo if n.graph is not model.graph)]:
        if id(node) not in waiting:
            infer_node(node)
            continue
        if node.graph is not model.graph:
            raise _refuse(node, "is inside the body of an If or a Loop")
        expansion = _EXPANSIONS.get(node.op_type)
        if expansion is None:
            raise _refuse(node, "has no expansion in standard operators")
        attributes = {name: a.value for name, a in node.attributes.items()}
        with editor.scope(str(node.name)):
            results = expansion(editor, node, attributes)
        for i, old in enumerate(node.outputs):
            new = results[i] if i < len(results) else None
            if new is not None:
                editor.replace(old, new)
            elif old.uses() or old.is_graph_output():
                raise _refuse(node, f"uses its output number {i}, which has no expansion")
    editor.finish_edit()


def is_contrib(node: ir.Node) -> bool:
    """Whether the node is an ONNX Runtime operator; a few of these are written without their domain."""
    return node.domain == DOMAIN or (node.op_type in _UNDOMAINED and not node.domain)


def has_expansion(op_type: str) -> bool:
    """Whether this operator has an expansion."""
    return op_type in _EXPANSIONS


_UNDOMAINED = ("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization", "SkipLayerNormalization")


def _refuse(node: ir.Node, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"the node {node.name} ({node.domain or 'ai.onnx'}::{node.op_type}) {why}",
        "Export the model with standard operators (opset 23 or 24), for example with torch.onnx.export(dynamo=True)",
    )


def _input(node: ir.Node, index: int) -> Value | None:
    return node.inputs[index] if len(node.inputs) > index else None


def _need(node: ir.Node, index: int) -> Value:
    value = _input(node, index)
    if value is None:
        raise _refuse(node, f"lacks its input number {index}")
    return value


def _rank(node: ir.Node, value: Value) -> int:
    if value.shape is None:
        raise _refuse(node, f"needs the rank of its input {value.name}, which the file does not state")
    return len(value.shape)


# normalization -------------------------------------------------------------------------------------------------------
def _rms(e: Editor, node: ir.Node, a: Mapping[str, Any]) -> Sequence[Value | None]:
    x, scale = _need(node, 0), _need(node, 1)
    epsilon, axis = float(a.get("epsilon", 1e-5)), int(a.get("axis", -1))
    return (e.op("RMSNormalization", x, scale, epsilon=epsilon, axis=axis),)


def _skip(e: Editor, node: ir.Node, bias: Value | None) -> Value:
    total = e.op("Add", _need(node, 0), _need(node, 1), name="sum")
    return total if bias is None else e.op("Add", total, bias, name="sum_bias")


def _skip_rms(e: Editor, node: ir.Node, a: Mapping[str, Any]) -> Sequence[Value | None]:
    total = _skip(e, node, _input(node, 3))
    normal = e.op("RMSNormalization", total, _need(node, 2), epsilon=float(a.get("epsilon", 1e-5)), axis=-1)
    return normal, None, None, total


def _skip_layer_norm(e: Editor, node: ir.Node, a: Mapping[str, Any]) -> Sequence[Value | None]:
    total = _skip(e, node, _input(node, 4))
    beta = _input(node, 3)
    inputs = [total, _need(node, 2)] + ([] if beta is None else [beta])
    normal = e.op("LayerNormalization", *inputs, epsilon=float(a.get("epsilon", 1e-5)), axis=-1)
    return normal, None, None, total


# activations ---------------------------------------------------------------------------------------------------------
def _gelu(approximate: str, biased: bool) -> Expansion:
    def expand(e: Editor, node: ir.Node, a: Mapping[str, Any]) -> Sequence[Value | None]:
        x, bias = _need(node, 0), _input(node, 1) if biased else None
        if bias is not None:
            x = e.op("Add", x, bias)
        return (e.op("Gelu", x, approximate=approximate),)

    return expand


def _quick_gelu(e: Editor, node: ir.Node, a: Mapping[str, Any]) -> Sequence[Value | None]:
    return (e.op("Swish", _need(node, 0), alpha=float(a.get("alpha", 1.702))),)


# matrices ------------------------------------------------------------------------------------------------------------
def _fused_matmul(e: Editor, node: ir.Node, a: Mapping[str, Any]) -> Sequence[Value | None]:
    if a.get("transBatchA") or a.get("transBatchB"):
        raise _refuse(node, "transposes its batch axes")

    def operand(index: int, flag: str) -> Value:
        value = _need(node, index)
        if not a.get(flag):
            return value
        rank = _rank(node, value)
        return e.op("Transpose", value, perm=[*range(rank - 2), rank - 1, rank - 2])

    y = e.op("MatMul", operand(0, "transA"), operand(1, "transB"))
    alpha = float(a.get("alpha", 1.0))
    return (y if alpha == 1.0 else e.op("Mul", y, e.constant(alpha)),)


def _constant(node: ir.Node, value: Value | None) -> ir.TensorProtocol:
    if value is None or value.const_value is None:
        raise _refuse(node, "computes its quantized weights at run time")
    return value.const_value


def _unpack(packed: Array, bits: int) -> Array:
    """uint8 [..., bytes] -> uint8 [..., bytes * 8 / bits], low bits first."""
    if bits == 8:
        return packed
    parts = [(packed >> np.uint8(shift)) & np.uint8((1 << bits) - 1) for shift in range(0, 8, bits)]
    return np.stack(parts, -1).reshape(*packed.shape[:-1], -1)


def _blocks(
    node: ir.Node, rows: int, columns: int, block: int, bits: int, quants: Value, scales: Value, zeros: Value | None
) -> Blocked:
    """The weight [rows, columns rounded up to whole blocks]; signed and symmetric if it has no zero points."""
    if bits not in (4, 8):
        raise _refuse(node, f"has {bits}-bit weights; only 4 and 8 bits are supported")
    count = -(-columns // block)
    quant, scale = _constant(node, quants), _constant(node, scales)
    zero = None if zeros is None else _constant(node, zeros)
    float_zeros = zero is not None and zero.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    half = scale.dtype == ir.DataType.FLOAT16
    scale_type = np.float16 if half and not float_zeros else np.float32
    middle = 1 << (bits - 1)
    symmetric = zero is None
    names = {(4, True): "int4", (4, False): "uint4", (8, True): "int8", (8, False): "uint8"}

    def unpacked(tensor: ir.TensorProtocol, width: int) -> Array:
        array = tensor.numpy()
        if tensor.dtype in (ir.DataType.UINT4, ir.DataType.INT4):
            return array.astype(np.uint8 if tensor.dtype == ir.DataType.UINT4 else np.int8).reshape(rows, -1)
        return _unpack(array.reshape(rows, -1), bits)[:, :width]

    def load() -> BlockedArrays:
        q = unpacked(quant, count * block)
        if q.shape[1] < count * block:
            q = np.pad(q, ((0, 0), (0, count * block - q.shape[1])))
        s = scale.numpy().astype(scale_type).reshape(rows, count)
        if symmetric:
            signed = q if q.dtype == np.int8 else (q.astype(np.int16) - middle).astype(np.int8)
            return BlockedArrays(signed, s)
        assert zero is not None
        if float_zeros:
            z = zero.numpy().astype(np.float32).reshape(rows, count)
            return BlockedArrays(q, s, minimums=np.negative(z) * np.asarray(s, np.float32))
        return BlockedArrays(q, s, zero_points=unpacked(zero, count))

    return Blocked(
        (rows, count * block),
        block,
        cast(Literal["int4", "uint4", "int8", "uint8"], names[bits, symmetric]),
        "float16" if scale_type == np.float16 else "float32",
        load,
        has_minimums=float_zeros,
        has_zero_points=not symmetric and not float_zeros,
    )


def _like(e: Editor, y: Value, x: Value) -> Value:
    """The float32 value `y`, cast to the type of `x`."""
    return y if x.dtype in (None, ir.DataType.FLOAT) else e.op("Cast", y, to=int(cast(ir.DataType, x.dtype)))


def _matmul_nbits(e: Editor, node: ir.Node, a: Mapping[str, Any]) -> Sequence[Value | None]:
    if _input(node, 4) is not None:
        raise _refuse(node, "permutes its groups (g_idx)")
    x, rows, columns = _need(node, 0), int(a["N"]), int(a["K"])
    block, bits = int(a["block_size"]), int(a.get("bits", 4))
    weight = _blocks(node, rows, columns, block, bits, _need(node, 1), _need(node, 2), _input(node, 3))
    matrix = e.weight(weight, "weight")
    if weight.shape[1] != columns:
        matrix = e.op("Slice", matrix, e.constant([0]), e.constant([columns]), e.constant([1]))
    y = e.op("MatMul", x, _like(e, e.op("Transpose", matrix, perm=[1, 0]), x))
    bias = _input(node, 5)
    return (y if bias is None else e.op("Add", y, bias),)


def _gather_blocks(e: Editor, node: ir.Node, a: Mapping[str, Any]) -> Sequence[Value | None]:
    data, indices, scales = _need(node, 0), _need(node, 1), _need(node, 2)
    tensor, bits = _constant(node, data), int(a.get("bits", 4))
    shape = [int(d) for d in tensor.shape.numpy()]
    if len(shape) != 2 or a.get("gather_axis", 0) != 0 or a.get("quantize_axis", 1) not in (1, -1):
        raise _refuse(node, "gathers along an axis other than the rows of a matrix")
    columns = shape[1] if tensor.dtype in (ir.DataType.UINT4, ir.DataType.INT4) else shape[1] * 8 // bits
    weight = _blocks(node, shape[0], columns, int(a.get("block_size", 128)), bits, data, scales, _input(node, 3))
    if weight.shape[1] != columns:
        raise _refuse(node, f"has {columns} columns in blocks of {weight.block}")
    return (_like(e, e.op("Gather", e.weight(weight, "weight"), indices, axis=0), scales),)


def _same(domain_name: str) -> Expansion:
    def expand(e: Editor, node: ir.Node, a: Mapping[str, Any]) -> Sequence[Value | None]:
        return e.nodes(domain_name, *node.inputs, outputs=len(node.outputs), **a)

    return expand


# attention -----------------------------------------------------------------------------------------------------------
def _rotary(e: Editor, node: ir.Node, a: Mapping[str, Any]) -> Sequence[Value | None]:
    x, positions, cos, sin = (_need(node, i) for i in range(4))
    if a.get("is_packed_batching"):
        raise _refuse(node, "packs its batch")
    if a.get("scale", 1.0) != 1.0:
        raise _refuse(node, "scales its positions")
    if _rank(node, positions) != 2:
        raise _refuse(node, "takes one offset instead of positions")
    attributes: dict[str, Any] = {"interleaved": int(a.get("interleaved", 0))}
    rotated = int(a.get("rotary_embedding_dim", 0))
    if rotated:
        attributes["rotary_embedding_dim"] = rotated
    heads = int(a.get("num_heads", 0))
    if not heads and (x.shape is None or len(x.shape) == 3):
        width, half = x.shape[2] if x.shape else None, cos.shape[1] if cos.shape else None
        if not isinstance(width, int) or not isinstance(half, int):
            raise _refuse(node, "does not state its number of heads")
        heads = width // (2 * half)
    if heads:
        attributes["num_heads"] = heads
    return (e.op("RotaryEmbedding", x, cos, sin, positions, **attributes),)


def _dim(e: Editor, x: Value, axis: int) -> Value:
    return e.op("Shape", x, start=axis, end=axis + 1)


def _new_positions(e: Editor, query: Value, past: Value | None) -> tuple[Value, Value]:
    """Positions of the new tokens [sequence] and of all tokens [past + sequence], int64."""
    zero, one = e.constant(0), e.constant(1)
    tokens = e.op("Squeeze", _dim(e, query, 1))
    before = e.op("Squeeze", _dim(e, past, 2)) if past is not None else zero
    total = e.op("Add", before, tokens)
    return e.op("Range", before, total, one), e.op("Range", zero, total, one)


def _group_query(e: Editor, node: ir.Node, a: Mapping[str, Any]) -> Sequence[Value | None]:
    heads, kv_heads = int(a["num_heads"]), int(a["kv_num_heads"])
    if a.get("k_quant_type", "NONE") != "NONE" or a.get("v_quant_type", "NONE") != "NONE":
        raise _refuse(node, "keeps its cache quantized")
    if a.get("qk_output", 0):
        raise _refuse(node, "outputs its scores")
    q, k, v = _need(node, 0), _input(node, 1), _input(node, 2)
    past_k, past_v, bias = _input(node, 3), _input(node, 4), _input(node, 10)
    if k is None:
        dim = _head_dim(node, q, past_k, heads + 2 * kv_heads)
        sizes = e.constant([heads * dim, kv_heads * dim, kv_heads * dim])
        q, k, v = e.nodes("Split", q, sizes, axis=2, outputs=3, name="qkv")
    assert v is not None
    new, every = _new_positions(e, q, past_k)
    if a.get("do_rotary"):
        cos, sin = _need(node, 7), _need(node, 8)
        positions = _input(node, 9)
        if positions is None:
            batch = e.op("Concat", _dim(e, q, 0), e.constant([1]), axis=0)
            positions = e.op("Expand", e.op("Unsqueeze", new, e.constant([0])), batch, name="positions")
        rotary: dict[str, Any] = {"interleaved": int(a.get("rotary_interleaved", 0))}
        if rotated := _rotated(cos, q, heads):
            rotary["rotary_embedding_dim"] = rotated
        q = e.op("RotaryEmbedding", q, cos, sin, positions, num_heads=heads, name="query", **rotary)
        k = e.op("RotaryEmbedding", k, cos, sin, positions, num_heads=kv_heads, name="key", **rotary)
    mask = None
    window = int(a.get("local_window_size", -1))
    if window > 0 or bias is not None:
        mask = _causal_mask(e, new, every, window)
        mask = mask if bias is None else e.op("Add", mask, bias)
    sinks = _input(node, 11)
    if sinks is None and a.get("smooth_softmax", 0) > 0:
        sinks = e.constant(np.zeros(heads, np.float32))
    scale, softcap = float(a.get("scale", 0.0)), float(a.get("softcap", 0.0))
    if sinks is not None:
        if bias is not None or past_k is None or past_v is None:
            raise _refuse(node, "has attention sinks beside a bias or without a past")
        mask = _causal_mask(e, new, every, 0) if mask is None else mask
        return _attention_with_sinks(
            e, node, (q, k, v), (past_k, past_v), mask, sinks, (heads, kv_heads), scale, softcap
        )
    return _attention(e, (q, k, v), (past_k, past_v), mask, (heads, kv_heads), scale, softcap, causal=mask is None)


def _head_dim(node: ir.Node, x: Value, past: Value | None, heads: int) -> int:
    """Columns of a head, taken from the cache or from an activation [batch, sequence, heads * columns]."""
    dim = past.shape[3] if past is not None and past.shape is not None and len(past.shape) == 4 else None
    width = x.shape[2] if x.shape is not None and len(x.shape) == 3 else None
    if isinstance(dim, int):
        return dim
    if isinstance(width, int):
        return width // heads
    raise _refuse(node, "does not state the width of its heads")


def _causal_mask(e: Editor, new: Value, every: Value, window: int) -> Value:
    """Additive mask [sequence, past + sequence]: 0 where a token may attend to another, -inf elsewhere."""
    distance = e.op("Sub", e.op("Unsqueeze", new, e.constant([1])), e.op("Unsqueeze", every, e.constant([0])))
    visible = e.op("GreaterOrEqual", distance, e.constant(0))
    if window > 0:
        visible = e.op("And", visible, e.op("Less", distance, e.constant(window)))
    return e.op("Where", visible, e.constant(0.0), e.constant(float(-np.inf)), name="mask")


def _attention_with_sinks(
    e: Editor,
    node: ir.Node,
    new: tuple[Value, Value, Value],
    past: tuple[Value, Value],
    mask: Value,
    sinks: Value,
    heads: tuple[int, int],
    scale: float,
    softcap: float,
) -> Sequence[Value | None]:
    """Attention whose softmax has one learned logit per head, which standard `Attention` does not support."""
    q, k, v = new
    kv_heads, group = heads[1], heads[0] // heads[1]
    dim = _head_dim(node, q, past[0], heads[0])

    def split(x: Value, past_part: Value) -> Value:
        by_head = e.op("Transpose", e.op("Reshape", x, e.constant([0, 0, kv_heads, -1])), perm=[0, 2, 1, 3])
        return e.op("Concat", past_part, by_head, axis=2)

    key, value = split(k, past[0]), split(v, past[1])
    query = e.op("Reshape", q, e.constant([0, 0, kv_heads, group, dim]))
    query = e.op("Mul", e.op("Transpose", query, perm=[0, 2, 3, 1, 4]), e.constant(float(scale or dim**-0.5)))
    across = e.op("Unsqueeze", e.op("Transpose", key, perm=[0, 1, 3, 2]), e.constant([2]))
    scores = e.op("MatMul", query, across, name="scores")
    if softcap:
        scores = e.op("Mul", e.op("Tanh", e.op("Div", scores, e.constant(softcap))), e.constant(softcap))
    scores = e.op("Add", scores, mask)
    column = e.op("Concat", e.op("Shape", scores, start=0, end=4), e.constant([1]), axis=0)
    sink = e.op("Expand", e.op("Reshape", sinks, e.constant([1, kv_heads, group, 1, 1])), column)
    weights = e.op("Softmax", e.op("Concat", scores, sink, axis=-1), axis=-1)
    weights = e.op("Slice", weights, e.constant([0]), e.constant([-1]), e.constant([-1]))
    out = e.op("MatMul", weights, e.op("Unsqueeze", value, e.constant([2])))
    return e.op("Reshape", e.op("Transpose", out, perm=[0, 3, 1, 2, 4]), e.constant([0, 0, -1])), key, value


def _rotated(cos: Value, query: Value, heads: int) -> int:
    """Columns of a head that the tables rotate; 0 if all of them, or if unknown."""
    half = cos.shape[1] if cos.shape is not None else None
    width = query.shape[2] if query.shape is not None and len(query.shape) == 3 else None
    if not isinstance(half, int):
        return 0
    return 0 if isinstance(width, int) and width // heads == 2 * half else 2 * half


def _attention(
    e: Editor,
    new: tuple[Value, Value, Value],
    past: tuple[Value | None, Value | None],
    mask: Value | None,
    heads: tuple[int, int],
    scale: float,
    softcap: float,
    causal: bool,
) -> Sequence[Value | None]:
    attributes: dict[str, Any] = {"q_num_heads": heads[0], "kv_num_heads": heads[1], "is_causal": int(causal)}
    if scale:
        attributes["scale"] = scale
    if softcap:
        attributes["softcap"] = softcap
    inputs: list[Value | None] = [*new]
    if mask is not None or past[0] is not None:
        inputs.append(mask)
    if past[0] is not None:
        inputs += past
    return e.nodes("Attention", *inputs, outputs=3, name="attention", **attributes)


def _multi_head(e: Editor, node: ir.Node, a: Mapping[str, Any]) -> Sequence[Value | None]:
    heads = int(a["num_heads"])
    q, k, v, bias = _need(node, 0), _input(node, 1), _input(node, 2), _input(node, 3)
    if k is None or v is None or any(x.shape is not None and len(x.shape) != 3 for x in (q, k, v)):
        raise _refuse(node, "packs query, key and value")
    if _input(node, 4) is not None or len(node.inputs) > 8:
        raise _refuse(node, "takes a padding mask or a shared cache")
    if bias is not None:
        third = bias.shape[0] if bias.shape is not None else None
        if not isinstance(third, int):
            raise _refuse(node, "has a bias of unknown length")
        parts = e.nodes("Split", bias, axis=0, num_outputs=3, outputs=3, name="bias")
        q, k, v = (e.op("Add", x, b) for x, b in zip((q, k, v), parts, strict=True))
    past = (_input(node, 6), _input(node, 7))
    causal, scale = bool(a.get("unidirectional", 0)), float(a.get("scale", 0.0))
    return _attention(e, (q, k, v), past, _input(node, 5), (heads, heads), scale, 0.0, causal=causal)


_EXPANSIONS: Mapping[str, Expansion] = {
    "BiasGelu": _gelu("none", True),
    "DequantizeLinear": _same("DequantizeLinear"),
    "FastGelu": _gelu("tanh", True),
    "FusedMatMul": _fused_matmul,
    "GatherBlockQuantized": _gather_blocks,
    "Gelu": _gelu("none", False),
    "GroupQueryAttention": _group_query,
    "MatMulNBits": _matmul_nbits,
    "MultiHeadAttention": _multi_head,
    "QuantizeLinear": _same("QuantizeLinear"),
    "QuickGelu": _quick_gelu,
    "RotaryEmbedding": _rotary,
    "SimplifiedLayerNormalization": _rms,
    "SkipLayerNormalization": _skip_layer_norm,
    "SkipSimplifiedLayerNormalization": _skip_rms,
    "Trilu": _same("Trilu"),
}
