"""Sparse attention in static shapes: the choice of `transom.ops.sparse_routing`, with a fixed number of units.

A graph never reads the whole cache of a sparse head. It reads the nodes (mean and variance of `node` keys each), which
the host stores beside the cache, scores units with them, gathers the best units, and attends to these, to the blocks of
the local window, and to the step's own keys. All steps are standard operators that the HTP supports.

The host computes everything that depends only on the position: masks, which blocks are near, and what is always read.
See `transom_mobile_export.qnn.sparse_inputs`, and `sparse_sizes` for the fixed sizes.

A step of one token is a block by itself. Longer steps begin at a multiple of 64 positions: row r of the step is the
token at that multiple plus r, and rows of tokens that are already cached are padding. So the step's blocks of queries
are rows 0 to 63, 64 to 127, …, and everything chosen for any of them is in the cache.

Shapes in the comments: S new tokens in B blocks of W rows, R of which are sampled; C tokens in the cache, N nodes, U
units, F gathered units; L keys of the near blocks of the cache; K sparse KV heads with G query heads each; D columns.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from transom.graph.weights import Array
from transom.ops.sparse_routing import BLOCK, VARIANCE_CAP, VARIANCE_WEIGHT
from transom.programs.onnx_writing import FLOAT, INT32, INT64, OnnxWriter
from transom_mobile_export.qnn.sparse_sizes import SPREAD, ChoiceSizes

UNIT_BONUS, RANK_MASK, NODE_MASK, NEAR_MASK = "unit_bonus", "mask_rank", "mask_nodes", "mask_near"
NEAR_BLOCKS, NODE_AT, NODE_CACHED, NODE_WEIGHTS = "near_blocks", "node_at", "node_cached", "node_weights"
LOOK, LOOK_WEIGHTS = "look", "look_weights"


@dataclass(frozen=True)
class Head:
    """The common parameters of one layer's sparse KV heads."""

    heads: tuple[int, ...]
    """Indices of the K sparse heads among all heads of the cache."""
    total: int
    group: int
    head_dim: int
    value_dim: int
    softcap: float
    sinks: Array | None
    """float32 [K * G]."""


@dataclass
class Marks:
    """Roles of the values of sparse attention, which quantization needs."""

    wide: list[ir.Value] = field(default_factory=list)
    """Values that stay float16."""
    like: list[tuple[ir.Value, str]] = field(default_factory=list)
    """Values, each with the name of a value of dense attention that has the same range."""


class StepInputs:
    """The inputs that all layers share, and values computed from them once.

    Args:
        mask_low: value of the host's masks for keys that are not seen.
    """

    def __init__(self, write: OnnxWriter, sizes: ChoiceSizes, mask_low: float, marks: Marks) -> None:
        self.write, self.sizes, self.mask_low, self.marks = write, sizes, mask_low, marks
        w, s, blocks = write, sizes, sizes.blocks
        self.bonus = w.input(UNIT_BONUS, FLOAT, (1, blocks, 1, s.units))
        self.node_mask = w.input(NODE_MASK, FLOAT, (1, blocks, 1, s.nodes))
        self.near_mask = w.input(NEAR_MASK, FLOAT, (1, blocks, s.places, s.near + s.tokens))
        self.near_blocks = w.input(NEAR_BLOCKS, INT32, (1, blocks * s.near_blocks))
        self.node_at = w.input(NODE_AT, INT32, (1, s.renewed // s.piece))
        self.node_cached = w.input(NODE_CACHED, FLOAT, (1, 1, s.renewed, 1))
        self.node_weights = w.input(NODE_WEIGHTS, FLOAT, (1, s.renewed_nodes, s.rule.node, 1))
        self.ranks = w.input(RANK_MASK, FLOAT, (1, blocks, 1, s.far)) if s.ranked else None
        self.look = self.look_weights = None
        if s.tokens > 1:
            self.look = w.input(LOOK, INT32, (blocks, 1, s.rows))
            self.look_weights = w.input(LOOK_WEIGHTS, FLOAT, (1, blocks, s.rows, 1))
        wide = (self.bonus, self.node_mask, self.node_cached, self.node_weights, self.ranks, self.look_weights)
        marks.wide.extend(value for value in wide if value is not None)
        self._by_group: dict[tuple[str, int], ir.Value] = {}

    def near_mask_of(self, group: int) -> ir.Value:
        """[1, B, G * W, L + S]."""
        return self._repeated("near", self.near_mask, group)

    def look_weights_of(self, group: int) -> ir.Value:
        """[1, B, G * R, 1]."""
        assert self.look_weights is not None
        found = self._repeated("weights", self.look_weights, group)
        self.marks.wide.append(found)
        return found

    def look_of(self, group: int) -> ir.Value:
        """int32 [B * G * R]: rows of [B, G, W]."""
        if ("look", group) not in self._by_group:
            w, s = self.write, self.sizes
            assert self.look is not None
            more = np.arange(s.blocks)[:, None, None] * (group - 1) * s.places
            more = more + np.arange(group)[None, :, None] * s.places
            index = w("Add", self.look, w.constant(more.astype(np.int32)))
            self._by_group["look", group] = w("Reshape", index, w.ints([-1]))
        return self._by_group["look", group]

    def _repeated(self, what: str, value: ir.Value, group: int) -> ir.Value:
        if group == 1:
            return value
        if (what, group) not in self._by_group:
            w = self.write
            scope, w.scope = w.scope, f"step.{what}.{group}."
            self._by_group[what, group] = w("Concat", *[value] * group, axis=2)
            w.scope = scope
        return self._by_group[what, group]


class SparseAttention:
    """Writes the attention of one layer's sparse heads.

    Args:
        step: the shared inputs.
        scope: prefix of the names of dense attention's values, whose ranges are known.
        head: the heads.
        past: keys and values, [1, total, C, columns].
        nodes: means and variances, [1, K, N, D].
    """

    def __init__(
        self, step: StepInputs, scope: str, head: Head, past: tuple[ir.Value, ir.Value],
        nodes: tuple[ir.Value, ir.Value],
    ) -> None:  # fmt: skip
        self.step, self.scope, self.head, self.past, self.nodes = step, scope, head, past, nodes
        self.write, self.sizes, self.marks = step.write, step.sizes, step.marks
        self.count = len(head.heads)

    def _wide(self, value: ir.Value) -> ir.Value:
        self.marks.wide.append(value)
        return value

    def _like(self, value: ir.Value, what: str) -> ir.Value:
        """Mark a value as having the range of dense attention's `scores`, `masked`, `shares` or `out`."""
        self.marks.like.append((value, f"{self.scope}{what}"))
        return value

    def attend(self, q: ir.Value, new: tuple[ir.Value, ir.Value]) -> ir.Value:
        """The output of the heads, [1, K * G, S, Dv].

        Args:
            q: [1, K * G, S, D], rotated and scaled.
            new: the step's keys and values as written to the cache, [1, K, S, columns].
        """
        w, s, head, count, group = self.write, self.sizes, self.head, self.count, self.head.group
        grid = self._grid(q)  # [K, B, G * W, D]
        near_keys, near_values = (
            w("Concat", self._near(past, columns), self._own(x, columns), axis=2)
            for past, x, columns in zip(self.past, new, (head.head_dim, head.value_dim), strict=True)
        )
        near = self._scores(grid, near_keys)
        near = self._like(w("Add", near, self.step.near_mask_of(group)), "masked")
        values, places = self._choice(grid, near)
        rows = self._rows(places)
        far = self._scores(grid, self._far(self.past[0], rows, head.head_dim))  # [K, B, G * W, F * unit]
        far = self._like(w("Add", far, self._far_mask(values)), "masked")
        parts = [far, near]
        if head.sinks is not None:
            zeros, sinks = self._sinks(near, head.sinks, s.places)
            self._like(zeros, "zeros")
            parts.append(self._like(sinks, "sinks"))
        shares = self._like(w("Softmax", w("Concat", *parts, axis=3), axis=-1), "shares")
        if head.sinks is not None:
            shares = w("Slice", shares, w.ints([0]), w.ints([-1]), w.ints([3]))
        read = w("Concat", self._far(self.past[1], rows, head.value_dim), near_values, axis=2)
        out = self._like(w("MatMul", shares, read), "out")  # [K, B, G * W, Dv]
        if s.tokens > 1:
            split = w("Reshape", out, w.ints([count, s.blocks, group, s.places, head.value_dim]))
            out = w("Transpose", split, perm=[0, 2, 1, 3, 4])
        return w("Reshape", out, w.ints([1, count * group, s.tokens, head.value_dim]))

    def renewed(self, keys: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Mean and variance of the nodes that the step's tokens belong to, [1, K, nodes, D].

        Args:
            keys: the step's keys as written to the cache, [1, K, S, D].
        """
        w, s, head = self.write, self.sizes, self.head
        node, columns = s.rule.node, head.head_dim
        cached = self._gathered(self.past[0], self.step.node_at, s.piece, columns)
        cached = w("Reshape", cached, w.ints([1, self.count, s.renewed, columns]))
        change = self._wide(w("Mul", self._wide(w("Sub", cached, keys)), self.step.node_cached))
        x = self._wide(w("Add", keys, change))
        x = self._wide(w("Reshape", x, w.ints([self.count, -1, node, columns])))  # [K, nodes, node, D]

        def mean_of(values: ir.Value) -> ir.Value:
            weighted = self._wide(w("Mul", values, self.step.node_weights))
            return self._wide(w("ReduceSum", weighted, w.ints([2]), keepdims=1))

        mean = mean_of(x)
        off = self._wide(w("Sub", x, mean))
        variance = mean_of(self._wide(w("Mul", off, off)))
        shape = w.ints([1, self.count, -1, columns])
        return w("Reshape", mean, shape), self._wide(w("Reshape", variance, shape))

    # where things are -------------------------------------------------------------------------------------------------
    def _grid(self, q: ir.Value) -> ir.Value:
        """[1, K * G, S, D] to [K, B, G * W, D]."""
        w, s, head, count = self.write, self.sizes, self.head, self.count
        if s.tokens > 1:
            split = w("Reshape", q, w.ints([count, head.group, s.blocks, s.places, head.head_dim]))
            q = w("Transpose", split, perm=[0, 2, 1, 3, 4])
        return w("Reshape", q, w.ints([count, s.blocks, head.group * s.places, head.head_dim]))

    def _own(self, new: ir.Value, columns: int) -> ir.Value:
        """The step's keys or values for each block, [K, B, S, columns]."""
        w, s = self.write, self.sizes
        own = w("Reshape", new, w.ints([self.count, 1, s.tokens, columns]))
        return own if s.blocks == 1 else w("Concat", *[own] * s.blocks, axis=1)

    def _near(self, cache: ir.Value, columns: int) -> ir.Value:
        """The near blocks of a cache, [K, B, L, columns]."""
        found = self._gathered(cache, self.step.near_blocks, BLOCK, columns)
        return self.write("Reshape", found, self.write.ints([self.count, self.sizes.blocks, self.sizes.near, columns]))

    def _gathered(self, cache: ir.Value, index: ir.Value, together: int, columns: int) -> ir.Value:
        """Pieces of `together` positions each, [K * pieces, together * columns], by an index int32 [1, pieces]."""
        w = self.write
        pieces = self.sizes.context // together
        starts = np.asarray(self.head.heads, np.int32)[:, None] * pieces
        rows = w("Reshape", w("Add", index, w.constant(starts.astype(np.int32))), w.ints([-1]))
        return w("Gather", w("Reshape", cache, w.ints([-1, together * columns])), rows, axis=0)

    def _rows(self, places: ir.Value) -> ir.Value:
        """int32 [K * B * F]: pieces of the cache for units [K, B, 1, F]."""
        w = self.write
        starts = np.asarray(self.head.heads, np.int32)[:, None, None, None] * self.sizes.units
        index = w("Add", w.cast(places, INT32), w.constant(starts.astype(np.int32)))
        return w("Reshape", index, w.ints([-1]))

    def _far(self, cache: ir.Value, rows: ir.Value, columns: int) -> ir.Value:
        """The chosen units, [K, B, F * unit, columns]."""
        w, s = self.write, self.sizes
        found = w("Gather", w("Reshape", cache, w.ints([-1, s.rule.unit * columns])), rows, axis=0)
        return w("Reshape", found, w.ints([self.count, s.blocks, s.far * s.rule.unit, columns]))

    # choosing ---------------------------------------------------------------------------------------------------------
    def _scores(self, q: ir.Value, keys: ir.Value) -> ir.Value:
        w, cap = self.write, self.head.softcap
        scores = self._like(w("MatMul", q, w("Transpose", keys, perm=[0, 1, 3, 2])), "scores")
        if not cap:
            return scores
        by = w.number(cap, FLOAT)
        ratio = self._like(w("Div", scores, by), "ratio")
        return self._like(w("Mul", self._like(w("Tanh", ratio), "tanh"), by), "capped")

    def _sinks(self, scores: ir.Value, sinks: Array, rows: int) -> tuple[ir.Value, ir.Value]:
        """A column of sinks behind scores [K, B, G * rows, T], and the zeros that it is added to: the HTP computes a
        constant in a Concat wrongly for some values (QNN 2.51)."""
        w = self.write
        column = np.repeat(np.asarray(sinks, np.float32).reshape(self.count, 1, -1, 1), rows, axis=2)
        last = self.sizes.near + self.sizes.tokens
        zeros = w("Mul", w("Slice", scores, w.ints([last - 1]), w.ints([last]), w.ints([3])), w.number(0.0, FLOAT))
        return zeros, w("Add", zeros, w.constant(column))

    def _choice(self, grid: ir.Value, near: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Scores, float [K, B, 1, F], and indices, int64, of the best units. Units in or after the local window score
        below 0.

        Args:
            near: scores of the near keys, masked, [K, B, G * W, L + S].
        """
        w, s, head, count, wide = self.write, self.sizes, self.head, self.count, self._wide
        rows = head.group * s.rows
        if s.tokens > 1:
            look = self.step.look_of(head.group)
            grid, near = (
                w("Gather", w("Reshape", x, w.ints([count, -1, width])), look, axis=1)
                for x, width in ((grid, head.head_dim), (near, s.near + s.tokens))
            )
            near = w("Reshape", near, w.ints([count, s.blocks, rows, s.near + s.tokens]))
        sampled = w("Reshape", grid, w.ints([1, count, s.blocks * rows, head.head_dim]))
        means, variances = (w("Transpose", x, perm=[0, 1, 3, 2]) for x in self.nodes)
        wide(variances)
        logits = self._like(w("MatMul", sampled, means), "scores")  # [1, K, B * G * R, N]
        more = wide(w("MatMul", wide(w("Mul", sampled, sampled)), variances))
        more = wide(w("Mul", more, w.number(0.5 * VARIANCE_WEIGHT, FLOAT)))
        logits = wide(w("Add", logits, wide(w("Min", more, w.number(VARIANCE_CAP, FLOAT)))))
        if head.softcap:
            by = w.number(head.softcap, FLOAT)
            logits = wide(w("Mul", wide(w("Tanh", wide(w("Div", logits, by)))), by))
        logits = wide(w("Add", logits, w.number(float(np.log(s.rule.node)), FLOAT)))
        logits = wide(w("Reshape", logits, w.ints([count, s.blocks, rows, s.nodes])))
        logits = wide(w("Add", logits, self.step.node_mask))
        parts = [logits, near]
        if head.sinks is not None:
            parts += [wide(x) for x in self._sinks(near, head.sinks, s.rows)][1:]
        shares = wide(w("Softmax", wide(w("Concat", *parts, axis=3)), axis=-1))
        shares = wide(w("Slice", shares, w.ints([0]), w.ints([s.nodes]), w.ints([3])))
        together = s.rule.unit // s.rule.node
        if together > 1:
            shares = wide(w("Reshape", shares, w.ints([count, s.blocks, rows * s.units, together])))
            shares = wide(w("ReduceSum", shares, w.ints([3]), keepdims=0))
            shares = wide(w("Reshape", shares, w.ints([count, s.blocks, rows, s.units])))
        shares = wide(w("Mul", shares, w.number(SPREAD / head.group**0.5, FLOAT)))
        squares = wide(w("Mul", shares, shares))
        if s.tokens > 1:
            squares = wide(w("Mul", squares, self.step.look_weights_of(head.group)))
        scores = wide(w("ReduceSum", squares, w.ints([2]), keepdims=1))  # [K, B, 1, U]
        scores = wide(w("Add", scores, self.step.bonus))
        values, places = w.several("TopK", scores, w.ints([s.far]), dtypes=(FLOAT, INT64), axis=-1, largest=1, sorted=1)
        return wide(values), places

    def _far_mask(self, values: ir.Value) -> ir.Value:
        """[K, B, 1, F * unit]: the mask for units that are gathered but not read."""
        w, s = self.write, self.sizes
        below = self._wide(w("Min", values, w.number(0.0, FLOAT)))
        mask = self._wide(w("Mul", below, w.number(-self.step.mask_low, FLOAT)))
        if self.step.ranks is not None:
            mask = self._wide(w("Min", mask, self.step.ranks))
        mask = self._wide(w("Reshape", mask, w.ints([self.count, s.blocks, s.far, 1])))
        mask = self._wide(w("Expand", mask, w.ints([self.count, s.blocks, s.far, s.rule.unit])))
        mask = w("Reshape", mask, w.ints([self.count, s.blocks, 1, s.far * s.rule.unit]))
        self.marks.like.append((mask, NEAR_MASK))
        return mask


def operators(graph: ir.Graph) -> Counter[str]:
    """How many nodes of each operator a graph has."""
    return Counter(node.op_type for node in graph)
