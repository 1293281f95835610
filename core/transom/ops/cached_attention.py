"""`transom::CachedAttention`: causal grouped-query attention over a cache, for ragged batches of sequences.

Every new token and every cached token carries the id of its sequence and its position in the sequence, so one call
serves any mix of prefill chunks and decodes without padding. The operator appends the new keys and values to the cache.
With a sparsity policy it reads only the keys that `transom.ops.sparse_routing` chooses, and is exact over them.

Sources: grouped-query attention, Ainslie et al. 2023 (arXiv:2305.13245); logit soft cap, Gemma 2 report
(arXiv:2408.00118); attention sinks, gpt-oss model card 2025 (one learned logit per head). Attribute names follow
ONNX `Attention`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from transom.ops import sparse_body, sparse_samples
from transom.ops.schema import Array, Attribute, Attributes, Dimension, OpSchema, Param, Sample, TensorSpec
from transom.ops.softmax import softmax
from transom.ops.sparse_attention import OBSERVER, attend, observe_dense
from transom.ops.sparse_routing import policy_of

if TYPE_CHECKING:
    import onnx_ir as ir

DOMAIN = "transom"
NAME = "CachedAttention"
INPUTS = (
    Param("query", "[tokens, q_num_heads * head_dim], rotated"),
    Param("key", "[tokens, kv_num_heads * head_dim], rotated"),
    Param("value", "[tokens, kv_num_heads * value_dim]"),
    Param("past_key", "[past, kv_num_heads * head_dim]"),
    Param("past_value", "[past, kv_num_heads * value_dim]"),
    Param("sequences", "[tokens], the sequence each new token belongs to", ("int64",)),
    Param("positions", "[tokens], the position of each new token in its sequence", ("int64",)),
    Param("past_sequences", "[past]", ("int64",)),
    Param("past_positions", "[past]", ("int64",)),
    Param("bias", "[q_num_heads or 1, tokens, past + tokens], added to the scaled, capped scores", optional=True),
    Param("sinks", "[q_num_heads], an extra logit in each head's softmax, without a value", optional=True),
)
OUTPUTS = (
    Param("output", "[tokens, q_num_heads * value_dim]"),
    Param("present_key", "[past + tokens, kv_num_heads * head_dim]: past_key, then key"),
    Param("present_value", "[past + tokens, kv_num_heads * value_dim]"),
)
ATTRIBUTES = (
    Attribute("q_num_heads", "int", None, "number of query heads; a multiple of kv_num_heads"),
    Attribute("kv_num_heads", "int", None, "number of key and value heads"),
    Attribute("scale", "float", 0.0, "factor on QKᵀ; 0: 1 / sqrt(head_dim)"),
    Attribute("is_causal", "int", 1, "1: a token does not see later positions"),
    Attribute("softcap", "float", 0.0, "c > 0: scores become c * tanh(scores / c), before bias and mask"),
    Attribute("sliding_window", "int", 0, "w > 0: a token at position p sees only positions above p - w"),
    Attribute("sparsity", "string", "dense", "the layer's sparsity policy, canonical; `dense` reads every visible key"),
    Attribute("layer", "int", 0, "index of the layer's cache"),
)


def _heads(attributes: Attributes) -> tuple[int, int, int]:
    q_heads, kv_heads = int(attributes["q_num_heads"]), int(attributes["kv_num_heads"])
    if kv_heads < 1 or q_heads % kv_heads:
        raise ValueError(f"q_num_heads {q_heads} is not a multiple of kv_num_heads {kv_heads}")
    return q_heads, kv_heads, q_heads // kv_heads


def reference(inputs: Sequence[Array | None], attributes: Attributes) -> tuple[Array, ...]:
    """NumPy reference: float32, one sequence at a time, exact over the keys that the policy chooses. See `INPUTS`."""
    q, k, v, past_k, past_v, seq, pos, past_seq, past_pos = (np.asarray(x) for x in inputs[:9])
    bias, sinks = (inputs[i] if len(inputs) > i else None for i in (9, 10))
    q_heads, kv_heads, group = _heads(attributes)
    present_k, present_v = np.concatenate([past_k, k]), np.concatenate([past_v, v])
    if not policy_of(inputs, attributes).dense:
        return attend(inputs, attributes), present_k, present_v
    if (observer := attributes.get(OBSERVER)) is not None:
        observe_dense(inputs, attributes, observer)
    tokens, dim = q.shape[0], q.shape[1] // q_heads
    value_dim = v.shape[1] // kv_heads
    scale = attributes["scale"] or dim**-0.5
    key_seq, key_pos = np.concatenate([past_seq, seq]), np.concatenate([past_pos, pos])
    out = np.zeros((tokens, q_heads, value_dim), np.float32)
    for sequence in np.unique(seq):
        rows, keys = np.flatnonzero(seq == sequence), np.flatnonzero(key_seq == sequence)
        queries = q[rows].reshape(len(rows), kv_heads, group, dim).transpose(1, 2, 0, 3).astype(np.float32)
        kh = present_k[keys].reshape(len(keys), kv_heads, dim).transpose(1, 2, 0).astype(np.float32)
        vh = present_v[keys].reshape(len(keys), kv_heads, value_dim).transpose(1, 0, 2).astype(np.float32)
        scores = (queries @ kh[:, None]) * np.float32(scale)
        if cap := attributes["softcap"]:
            scores = np.float32(cap) * np.tanh(scores / np.float32(cap))
        if bias is not None:
            chosen = np.broadcast_to(bias, (q_heads, *bias.shape[1:]))[:, rows][:, :, keys]
            scores = scores + chosen.reshape(scores.shape)
        distance = pos[rows][:, None] - key_pos[keys][None, :]
        visible = np.ones(distance.shape, bool)
        if attributes["is_causal"]:
            visible &= distance >= 0
        if window := attributes["sliding_window"]:
            visible &= distance < window
        scores = np.where(visible, scores, -np.inf)
        sink = None if sinks is None else np.asarray(sinks, np.float32).reshape(kv_heads, group, 1, 1)
        heads = softmax(scores, sink) @ vh[:, None]
        out[rows] = heads.transpose(2, 0, 1, 3).reshape(len(rows), q_heads, value_dim)
    return out.reshape(tokens, q_heads * value_dim), present_k, present_v


def infer(specs: Sequence[TensorSpec | None], attributes: Attributes) -> tuple[TensorSpec, ...]:
    """Output types and shapes; `past + tokens` is a number if both are numbers, otherwise the symbol `present`."""
    q_heads, kv_heads, _ = _heads(attributes)
    q, k, v, past_k, past_v = (s or TensorSpec("float32", None) for s in specs[:5])

    def dims(spec: TensorSpec, heads: int, name: str) -> tuple[Dimension, Dimension]:
        if spec.shape is None:
            return None, None
        if len(spec.shape) != 2:
            raise ValueError(f"{name} must have rank 2, not {len(spec.shape)}")
        if isinstance(spec.shape[1], int) and spec.shape[1] % heads:
            raise ValueError(f"{name} has {spec.shape[1]} columns, which is not divisible by {heads} heads")
        return spec.shape[0], spec.shape[1]

    tokens, _ = dims(q, q_heads, "query")
    key_width = dims(k, kv_heads, "key")[1] or dims(past_k, kv_heads, "past_key")[1]
    value_width = dims(v, kv_heads, "value")[1] or dims(past_v, kv_heads, "past_value")[1]
    past = dims(past_k, kv_heads, "past_key")[0]
    total: Dimension = tokens + past if isinstance(tokens, int) and isinstance(past, int) else "present"
    width = value_width // kv_heads * q_heads if isinstance(value_width, int) else None
    return (
        TensorSpec(q.dtype, (tokens, width)),
        TensorSpec(k.dtype, (total, key_width)),
        TensorSpec(v.dtype, (total, value_width)),
    )


def body(attributes: Attributes, present: Sequence[bool]) -> ir.Function:
    """The operator in standard ONNX (opset 24), specialized to its attributes and to the optional inputs present."""
    import onnx_ir as ir

    from transom.ops.functions import FunctionWriter

    q_heads, kv_heads, group = _heads(attributes)
    has_bias, has_sinks = (len(present) > i and present[i] for i in (9, 10))
    f = FunctionWriter(DOMAIN, NAME, [p.name for p in INPUTS[: len(present)]])
    if not policy_of(present, attributes).dense:
        return f.finish(sparse_body.attend(f, attributes, present), ATTRIBUTES, attributes, present)
    q, k, v, past_k, past_v, seq, pos, past_seq, past_pos = f.inputs[:9]
    present_k, present_v = f("Concat", past_k, k, axis=0), f("Concat", past_v, v, axis=0)

    def split(x: ir.Value, heads: Sequence[int], perm: Sequence[int]) -> ir.Value:
        return f("Transpose", f("Reshape", x, f.ints([0, *heads, -1])), perm=list(perm))

    qh = split(q, [kv_heads, group], [1, 2, 0, 3])  # [kv_heads, group, tokens, head_dim]
    kh = f("Unsqueeze", split(present_k, [kv_heads], [1, 2, 0]), f.ints([1]))  # [kv_heads, 1, head_dim, keys]
    vh = f("Unsqueeze", split(present_v, [kv_heads], [1, 0, 2]), f.ints([1]))  # [kv_heads, 1, keys, value_dim]
    if attributes["scale"]:
        scale = f.floats(attributes["scale"])
    else:
        dim = f("Cast", f("Gather", f("Shape", qh), f.ints(3)), to=int(ir.DataType.FLOAT))
        scale = f("Reciprocal", f("Sqrt", dim))
    scores = f("MatMul", f("Mul", qh, scale), kh)
    if cap := attributes["softcap"]:
        scores = f("Mul", f("Tanh", f("Div", scores, f.floats(cap))), f.floats(cap))
    rows, columns = f.ints([1]), f.ints([0])
    if has_bias:
        lengths = f("Slice", f("Shape", scores), f.ints([2]), f.ints([4]))
        every_head = f("Expand", f.inputs[9], f("Concat", f.ints([q_heads]), lengths, axis=0))
        shape = f("Concat", f.ints([kv_heads, group]), lengths, axis=0)
        scores = f("Add", scores, f("Reshape", every_head, shape))
    key_seq, key_pos = f("Concat", past_seq, seq, axis=0), f("Concat", past_pos, pos, axis=0)
    visible = f("Equal", f("Unsqueeze", seq, rows), f("Unsqueeze", key_seq, columns))
    distance = f("Sub", f("Unsqueeze", pos, rows), f("Unsqueeze", key_pos, columns))
    if attributes["is_causal"]:
        visible = f("And", visible, f("GreaterOrEqual", distance, f.ints(0)))
    if window := attributes["sliding_window"]:
        visible = f("And", visible, f("Less", distance, f.ints(window)))
    scores = f("Where", visible, scores, f.floats(-np.inf))
    if has_sinks:
        column = f("Concat", f("Slice", f("Shape", scores), f.ints([0]), f.ints([3])), f.ints([1]), axis=0)
        sink = f("Expand", f("Reshape", f.inputs[10], f.ints([kv_heads, group, 1, 1])), column)
        weights = f("Softmax", f("Concat", scores, sink, axis=-1), axis=-1)
        weights = f("Slice", weights, f.ints([0]), f.ints([-1]), f.ints([3]))
    else:
        weights = f("Softmax", scores, axis=-1)
    heads = f("Transpose", f("MatMul", weights, vh), perm=[2, 0, 1, 3])  # [tokens, kv_heads, group, value_dim]
    out = f("Reshape", heads, f.ints([0, -1]))
    return f.finish([out, present_k, present_v], ATTRIBUTES, attributes, present)


def samples(rng: np.random.Generator) -> Iterator[Sample]:
    """Ragged batches that mix prefill and decode and cover every attribute and optional input."""
    variants: tuple[dict[str, Any], ...] = (
        {},
        {"sliding_window": 5},
        {"softcap": 20.0},
        {"scale": 0.3},
        {"is_causal": 0},
        {"no_past": True},
        {"one_token_each": True},
        {"sinks": True},
        {"bias": True},
        {"softcap": 30.0, "sliding_window": 4, "sinks": True, "bias": True},
    )
    known = {a.name for a in ATTRIBUTES}
    for variant in variants:
        q_heads, kv_heads = [(4, 4), (6, 2), (8, 1)][rng.integers(3)]
        dim, value_dim = int(rng.choice([16, 32])), int(rng.choice([16, 32]))
        new, old = [1, int(rng.integers(2, 9)), 1], [int(rng.integers(1, 12)), 0, 3]
        if variant.get("no_past"):
            old = [0, 0, 0]
        if variant.get("one_token_each"):
            new = [1, 1, 1]
        seq, past_seq = np.repeat([4, 0, 9], new), np.repeat([4, 0, 9], old)
        pos = np.concatenate([o + np.arange(n) for n, o in zip(new, old, strict=True)])
        past_pos = np.concatenate([np.arange(o) for o in old])
        mix = rng.permutation(len(past_seq))  # the packed cache may hold its tokens in any order

        def floats(*shape: int) -> Array:
            return rng.standard_normal(shape).astype(np.float32)

        t, p = len(seq), len(past_seq)
        optional: list[Array | None] = []
        if variant.get("bias") or variant.get("sinks"):
            optional.append(floats(int(rng.choice([1, q_heads])), t, t + p) if variant.get("bias") else None)
        if variant.get("sinks"):
            optional.append(floats(q_heads))
        yield Sample(
            ", ".join(f"{k}={v}" for k, v in variant.items()) or "plain",
            (
                floats(t, q_heads * dim),
                floats(t, kv_heads * dim),
                floats(t, kv_heads * value_dim),
                floats(p, kv_heads * dim),
                floats(p, kv_heads * value_dim),
                seq.astype(np.int64),
                pos.astype(np.int64),
                past_seq[mix].astype(np.int64),
                past_pos[mix].astype(np.int64),
                *optional,
            ),
            {"q_num_heads": q_heads, "kv_num_heads": kv_heads} | {k: v for k, v in variant.items() if k in known},
            outputs=3,
        )
    yield from sparse_samples.samples(rng, {a.name: a.default for a in ATTRIBUTES})


SCHEMA = OpSchema(
    DOMAIN, NAME, 1, __doc__ or "", INPUTS, OUTPUTS, ATTRIBUTES, reference, samples=samples, infer=infer, body=body
)
