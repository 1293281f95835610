"""The result of a sparse `transom::CachedAttention`: exact softmax over the keys that `sparse_routing` chooses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from transom.ops.schema import Array, Attributes
from transom.ops.softmax import softmax
from transom.ops.sparse_routing import HeadRoute, choose, dense_route, rows_in_order

Observer = Callable[[HeadRoute], None]
"""Called with the route of each sequence and KV head of a call."""
OBSERVER = "__observer__"
"""Key under which the attributes of a call may contain an `Observer`. It is not an attribute of the operator."""


def attend(inputs: Sequence[Array | None], attributes: Attributes) -> Array:
    """The operator's first output, float32 [tokens, q_num_heads * value_dim].

    Args:
        inputs: the operator's inputs, in order.
        attributes: the operator's attributes, defaults filled in; `sparsity` is not `"dense"`.

    Raises:
        ValueError: as `sparse_routing.choose`.
    """
    q, k, v, past_k, past_v = (np.asarray(inputs[i]) for i in range(5))
    sinks = inputs[10] if len(inputs) > 10 else None
    q_heads, kv_heads = int(attributes["q_num_heads"]), int(attributes["kv_num_heads"])
    group = q_heads // kv_heads
    dim, value_dim = k.shape[1] // kv_heads, v.shape[1] // kv_heads
    scale = np.float32(attributes["scale"] or dim**-0.5)
    queries = q.astype(np.float32).reshape(-1, kv_heads, group, dim)
    keys = np.concatenate([past_k, k]).astype(np.float32).reshape(-1, kv_heads, dim)
    values = np.concatenate([past_v, v]).astype(np.float32).reshape(-1, kv_heads, value_dim)
    out = np.zeros((len(q), kv_heads, group, value_dim), np.float32)
    unit = _unit(attributes)
    observer: Observer | None = attributes.get(OBSERVER)
    for routed in choose(inputs, attributes):
        new, everything = rows_in_order(inputs, routed.sequence)
        head, first = routed.head, len(everything) - len(new)
        sink = None if sinks is None else np.asarray(sinks, np.float32).reshape(kv_heads, group, 1, 1)[head]
        for block in routed.route.blocks:
            at = np.flatnonzero(block.reads(unit))  # positions, which index `everything`
            rows = new[block.begin - first : block.end + 1 - first]
            scores = (queries[rows, head].transpose(1, 0, 2) @ keys[everything[at], head].T) * scale
            if cap := attributes["softcap"]:
                scores = np.float32(cap) * np.tanh(scores / np.float32(cap))
            distance = np.arange(block.begin, block.end + 1)[:, None] - at
            seen = distance >= 0
            if window := attributes["sliding_window"]:
                seen &= distance < window
            weights = softmax(np.where(seen, scores, -np.inf), sink)  # [G, rows, keys]
            out[rows, head] = (weights @ values[everything[at], head]).transpose(1, 0, 2)
        if observer is not None:
            observer(routed)
    return out.reshape(len(q), -1)


def _unit(attributes: Attributes) -> int:
    from transom.sparsity import LayerSparsity

    rule = LayerSparsity.from_string(str(attributes["sparsity"])).rule
    assert rule is not None  # dense calls never reach this
    return rule.unit


def observe_dense(inputs: Sequence[Array | None], attributes: Attributes, observer: Observer) -> None:
    """Call the observer for a call that reads every key."""
    for sequence in np.unique(np.asarray(inputs[5])):
        new, everything = rows_in_order(inputs, int(sequence))
        head_route = dense_route(len(everything) - len(new), len(everything), int(attributes["sliding_window"]))
        for head in range(int(attributes["kv_num_heads"])):
            observer(HeadRoute(int(sequence), head, head_route))
