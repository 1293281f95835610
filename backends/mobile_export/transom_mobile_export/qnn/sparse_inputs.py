"""The inputs of a graph with sparse attention besides tokens and caches; all of them follow from the position.

See `transom_mobile_export.qnn.sparse` for how the graph uses them, and for the letters in the shapes.
"""

from __future__ import annotations

import numpy as np

from transom.graph.weights import Array
from transom.ops.sparse_routing import BLOCK
from transom_mobile_export.qnn.sparse import (
    LOOK,
    LOOK_WEIGHTS,
    NEAR_BLOCKS,
    NEAR_MASK,
    NODE_AT,
    NODE_CACHED,
    NODE_MASK,
    NODE_WEIGHTS,
    RANK_MASK,
    UNIT_BONUS,
)
from transom_mobile_export.qnn.sparse_sizes import FORCED, ChoiceSizes


def base_of(sizes: ChoiceSizes, past: int) -> int:
    """The position of the step's row 0."""
    return past if sizes.tokens == 1 else past // BLOCK * BLOCK


def step_inputs(sizes: ChoiceSizes, past: int, count: int, mask_low: float) -> dict[str, Array]:
    """The shared inputs of a step.

    Args:
        past: tokens in the cache.
        count: new tokens; with those from `base_of` to `past`, at most S.
        mask_low: mask value for keys that are not seen.
    """
    s, rule, base = sizes, sizes.rule, base_of(sizes, past)
    last = past + count - 1
    bonus = np.full((1, s.blocks, 1, s.units), -1, np.float32)
    nodes = np.full((1, s.blocks, 1, s.nodes), mask_low, np.float32)
    near = np.full((1, s.blocks, s.places, s.near + s.tokens), mask_low, np.float32)
    ranks = np.zeros((1, s.blocks, 1, s.far), np.float32)
    blocks = np.zeros((s.blocks, s.near_blocks), np.int32)
    look = np.zeros((s.blocks, 1, s.rows), np.int32)
    look_weights = np.zeros((1, s.blocks, s.rows, 1), np.float32)
    own = base + np.arange(s.tokens)
    own_there = (own >= past) & (own <= last)
    for b in range(s.blocks):
        begin, end = max(base + b * BLOCK, past), min(base + b * BLOCK + s.places - 1, last)
        if begin > end:
            continue  # only padding: it reads nothing
        far_end = s.far_end(begin)
        far = far_end // rule.unit
        bonus[0, b, 0, :far] = 0
        bonus[0, b, 0, : far if s.reads_all(end) else min(far, BLOCK // rule.unit)] = FORCED
        if not s.reads_all(end):
            ranks[0, b, 0, s.chosen :] = mask_low
        nodes[0, b, 0, : far_end // rule.node] = 0
        blocks[b] = np.minimum(far_end // BLOCK + np.arange(s.near_blocks), s.context // BLOCK - 1)
        cached = far_end + np.arange(s.near)
        at = np.concatenate([np.where(cached < past, cached, last + 1), np.where(own_there, own, last + 1)])
        row = base + b * BLOCK + np.arange(s.places)
        near[0, b][at[None] <= np.minimum(row, last)[:, None]] = 0
        if s.tokens > 1:
            stride = BLOCK // rule.rows
            rows = np.arange(begin + stride - 1, end + 1, stride) if end + 1 - begin >= stride else np.array([end])
            look[b, 0, : len(rows)] = rows - base
            look[b, 0, len(rows) :] = rows[-1] - base
            look_weights[0, b, : len(rows), 0] = 1 / len(rows)
    first = past // s.piece * s.piece
    there = (first + np.arange(s.renewed) <= last).reshape(-1, rule.node)
    pieces = first // s.piece + np.arange(s.renewed // s.piece)
    weights = there / np.maximum(there.sum(1, keepdims=True), 1)
    found: dict[str, Array] = {
        UNIT_BONUS: bonus, NODE_MASK: nodes, NEAR_MASK: near, NEAR_BLOCKS: blocks.reshape(1, -1),
        NODE_AT: np.minimum(pieces, s.context // s.piece - 1).astype(np.int32)[None],
        NODE_CACHED: (first + np.arange(s.renewed) < past).astype(np.float32).reshape(1, 1, -1, 1),
        NODE_WEIGHTS: weights.astype(np.float32)[None, :, :, None],
    }  # fmt: skip
    if s.ranked:
        found[RANK_MASK] = ranks
    if s.tokens > 1:
        found |= {LOOK: look, LOOK_WEIGHTS: look_weights}
    return found


def first_node(sizes: ChoiceSizes, past: int) -> int:
    """Index of the first node that the step's new means and variances replace."""
    return past // sizes.piece * sizes.piece // sizes.rule.node
