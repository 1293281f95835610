"""Sparse attention in static shapes: the same choice as `transom.ops.sparse_routing`, with a fixed number of units.

For each block of queries a fixed number of units per KV head is gathered from the cache, and attention runs over them.
Every step is a standard operator whose shapes follow from those of the inputs, so TensorRT needs no plug-in. Means and
variances of nodes are kept beside the cache, and recomputed for nodes that get new tokens.

Only policies that choose a fixed number of units (`top_k`) have such shapes, and only without columns, which would need
queries of past steps. Blocks that read everything, because they have few keys or would read most of them, fit into the
same number of units: see `SparseSizes`.

Shapes in the comments: B sequences with S new tokens each; K KV heads with G query heads each; NB blocks of W query
places; R sampled queries of a block; C positions in the cache, N nodes, U units; F units before the local window that
are read; L keys of the local window and the block itself; D columns of a key head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from transom.ops.sparse_routing import BLOCK, DENSE_ABOVE, VARIANCE_CAP, VARIANCE_WEIGHT
from transom.programs.onnx_writing import BOOL, FLOAT, INT64, OnnxWriter
from transom_tensorrt.attention import LEAST
from transom_tensorrt.network import ALIGNMENT

if TYPE_CHECKING:
    from transom.sparsity import Sparsity
    from transom_tensorrt.attention import LayerAttention

FORCED = 2.0
"""Score of the first block, above any that a unit can have."""


def unaligned(policy: Sparsity, columns: int) -> str:
    """Why the means of heads with `columns` columns are not aligned for TensorRT; empty if they are. The float32 means
    of a block's nodes must fill a multiple of `ALIGNMENT`."""
    if policy.dense or BLOCK // policy.node * columns * 4 % ALIGNMENT == 0:
        return ""
    least = ALIGNMENT // 4 // math.gcd(ALIGNMENT // 4, BLOCK // policy.node)
    return f"sparse attention needs heads of a multiple of {least} columns, and these have {columns}"


@dataclass(frozen=True)
class SparseSizes:
    """The fixed sizes of a policy over a cache."""

    rule: Sparsity
    positions: int
    """C, a multiple of 64."""

    @property
    def local(self) -> int:
        """Blocks of the local window."""
        return -(-self.rule.local_window // BLOCK)

    @property
    def near(self) -> int:
        """L."""
        return (self.local + 1) * BLOCK

    @property
    def nodes(self) -> int:
        """N, for one block more than the cache has: the update of the last nodes may reach into it."""
        return (self.positions + BLOCK) // self.rule.node

    @property
    def units(self) -> int:
        """U."""
        return (self.positions + BLOCK) // self.rule.unit

    @property
    def far(self) -> int:
        """F: the chosen units and those of the first block, or all units of a block that reads everything."""
        rule = self.rule
        chosen = rule.top_k + BLOCK // rule.unit
        everything = rule.dense_below
        if self.dense_by_density:
            most = (chosen * rule.unit + self.near) * DENSE_ABOVE[1] // DENSE_ABOVE[0] + 1
            everything = max(everything, most)
        all_units = -(-max(0, everything - self.local * BLOCK) // rule.unit) + 1
        return min(self.units, max(chosen, all_units))

    @property
    def dense_by_density(self) -> bool:
        """Whether a block that would read most of its keys reads all of them."""
        return self.rule.max_density * DENSE_ABOVE[1] > DENSE_ABOVE[0]


@dataclass(frozen=True)
class SparseHeads:
    """The sparse KV heads of a layer, among all heads of its cache."""

    layer: LayerAttention
    """The layer with the sparse heads only."""
    heads: tuple[int, ...]
    total: int


class Blocks:
    """The positions of a step's queries: the block of each, and which queries are sampled.

    With one token per sequence, as in decoding, a block has one place, otherwise 64.
    """

    def __init__(self, write: OnnxWriter, past: ir.Value, ids: ir.Value, sizes: SparseSizes) -> None:
        w, rule = write, sizes.rule
        self.write, self.past, self.sizes = w, past, sizes
        shape = w("Shape", ids, dtype=INT64)
        one = w.ints([1])
        self.batch = w("Slice", shape, w.ints([0]), w.ints([1]), w.ints([0]))  # int64 [1], as are the next
        self.tokens = w("Slice", shape, w.ints([1]), w.ints([2]), w.ints([0]))
        more = w("Sub", self.tokens, one)
        self.places = w("Min", w.ints([BLOCK]), w("Add", one, w("Mul", more, w.ints([BLOCK]))))
        self.looked = w("Min", w.ints([rule.rows]), w("Add", one, w("Mul", more, w.ints([rule.rows]))))
        spread = w("Sub", w("Add", self.tokens, w("Mul", self.places, w.ints([2]))), w.ints([2]))
        self.blocks = w("Div", spread, self.places)

        first = w("Unsqueeze", past, w.ints([1]))  # [B, 1], as are the next two
        self.last = w("Add", first, more)
        self.skipped = w("Sub", first, w("Mul", w("Div", first, self.places), self.places))
        """Places of the first block that belong to earlier tokens."""
        number = self.range(self.blocks)
        starts = w("Add", w("Sub", first, self.skipped), w("Mul", number, self.places))  # [B, NB], as are the next
        self.begin = w("Min", w("Max", starts, first), self.last)
        self.end = w("Min", w("Add", starts, w("Sub", self.places, one)), self.last)
        block = w("Div", self.begin, w.ints(BLOCK))
        self.far_end = w("Mul", w("Max", w("Sub", block, w.ints(sizes.local)), w.ints(0)), w.ints(BLOCK))

        grid = w("Add", w("Unsqueeze", starts, w.ints([2])), self.range(self.places))  # [B, NB, W]
        inside = w("Min", w("Max", grid, w("Unsqueeze", first, w.ints([2]))), w("Unsqueeze", self.last, w.ints([2])))
        self.position = inside
        """int64 [B, NB, W]: position of the query in each place; an empty place repeats its neighbor."""
        self.rows = self._row(inside)
        """int64 [B * NB * W]: the query's row in the step."""
        stride = BLOCK // rule.rows
        steps = w("Mul", w("Add", self.range(self.looked), one), w.ints(stride))
        at = w("Sub", w("Add", w("Unsqueeze", self.begin, w.ints([2])), steps), one)  # [B, NB, R]
        end = w("Unsqueeze", self.end, w.ints([2]))
        size = w("Add", w("Sub", end, w("Unsqueeze", self.begin, w.ints([2]))), one)
        alone = w("Less", size, w.ints(stride), dtype=BOOL)
        zeroth = w("Equal", self.range(self.looked), w.ints(0), dtype=BOOL)
        at = w("Where", w("And", alone, zeroth), end, at, dtype=INT64)
        self.is_looked = w("LessOrEqual", at, end, dtype=BOOL)
        """bool [B, NB, R]: whether that sampled query exists; a short block has fewer."""
        self.look = w("Min", at, end)
        """int64 [B, NB, R]: positions of the sampled queries."""
        self.look_rows = self._row(self.look)
        """int64 [B * NB * R]: their rows in the step."""
        whole = w("Mul", self.blocks, self.places)
        sequence = w("Mul", self.range(self.batch), whole)
        back = w("Add", w("Unsqueeze", w("Add", sequence, w("Squeeze", self.skipped, w.ints([1]))), w.ints([1])),
                 self.range(self.tokens))  # fmt: skip
        self.back = w("Reshape", back, w.ints([-1]))
        """int64 [B * S]: the place of each token among all places."""

    def range(self, count: ir.Value) -> ir.Value:
        """int64 [count]: 0, 1, … below a count [1]."""
        w = self.write
        return w("Range", w.ints(0), w("Squeeze", count, w.ints([0])), w.ints(1))

    def _row(self, position: ir.Value) -> ir.Value:
        """The step's rows of positions [B, …, …], flattened."""
        w = self.write
        base = w("Mul", self.range(self.batch), self.tokens)
        inner = w("Sub", position, w("Unsqueeze", self.past, w.ints([1, 2])))
        return w("Reshape", w("Add", inner, w("Unsqueeze", base, w.ints([1, 2]))), w.ints([-1]))

    def shape(self, *dims: int | ir.Value) -> ir.Value:
        """A shape made of numbers and counts [1]."""
        w = self.write
        parts = [w.ints([d]) if isinstance(d, int) else d for d in dims]
        return w("Concat", *parts, axis=0)

    def rows_of_cache(self, index: ir.Value, part: SparseHeads, count: int) -> ir.Value:
        """Flat rows of a cache [B * all heads * count, …] for an index [B, K or 1, NB, n] below `count`."""
        w = self.write
        sequences = w("Mul", self.range(self.batch), w.ints(part.total * count))
        base = w("Add", w("Unsqueeze", sequences, w.ints([1])), w.constant(np.asarray(part.heads, np.int64) * count))
        return w("Reshape", w("Add", index, w("Unsqueeze", base, w.ints([2, 3]))), w.ints([-1]))

    def first_seen(self, position: ir.Value, window: int) -> ir.Value:
        """The first position that a query sees."""
        w = self.write
        if not window:
            return w("Mul", position, w.ints(0))
        return w("Max", w("Sub", position, w.ints(window - 1)), w.ints(0))


def updated_nodes(
    b: Blocks, part: SparseHeads, keys: ir.Value, means: ir.Value, variances: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """Means and variances, float32 [B, K, N, D], recomputed for the nodes of the step's tokens.

    Args:
        keys: the cache with the step's tokens and all heads, [B, all heads, C, D].
    """
    w, node, sizes = b.write, b.sizes.rule.node, b.sizes
    heads, columns = len(part.heads), part.layer.cache.head_dim
    count = w("Div", w("Add", b.tokens, w.ints([2 * node - 2])), w.ints([node]))
    first = w("Div", b.past, w.ints(node))  # [B]
    at = w("Mul", w("Add", w("Unsqueeze", first, w.ints([1])), b.range(count)), w.ints(node))  # [B, n]
    at = w("Add", w("Unsqueeze", at, w.ints([2])), w.constant(np.arange(node, dtype=np.int64)))  # [B, n, node]
    there = w("LessOrEqual", at, w("Unsqueeze", b.last, w.ints([2])), dtype=BOOL)
    weight = w("Unsqueeze", w.cast(there, FLOAT), w.ints([1, 4]))  # [B, 1, n, node, 1]
    inside = w("Min", at, w.ints(sizes.positions - 1))
    flat = b.rows_of_cache(w("Reshape", inside, w.ints([0, 1, 1, -1])), part, sizes.positions)
    rows = w("Gather", w("Reshape", keys, w.ints([-1, columns])), flat, axis=0)
    x = w("Reshape", w.cast(rows, FLOAT), b.shape(b.batch, heads, count, node, columns))
    total = w("Max", w("ReduceSum", weight, w.ints([3]), keepdims=0), w.number(1.0, FLOAT))  # [B, 1, n, 1]
    kept = w("Mul", x, weight)
    mean = w("Div", w("ReduceSum", kept, w.ints([3]), keepdims=0), total)  # [B, K, n, D]
    square = w("Div", w("ReduceSum", w("Mul", kept, x), w.ints([3]), keepdims=0), total)
    variance = w("Max", w("Sub", square, w("Mul", mean, mean)), w.number(0.0, FLOAT))
    return (w("TensorScatter", means, mean, first, axis=-2), w("TensorScatter", variances, variance, first, axis=-2))


@dataclass(frozen=True)
class ReadBlocks:
    """The keys and values that the blocks of a step read, and which of them each place sees."""

    keys: ir.Value
    """[B * K * NB, 1, F * unit + L, D]."""
    values: ir.Value
    seen: ir.Value
    """bool [B * K * NB, 1, W, F * unit + L]."""


def read(
    b: Blocks, part: SparseHeads, q: ir.Value, keys: ir.Value, values: ir.Value, means: ir.Value, variances: ir.Value
) -> ReadBlocks:
    """Choose units, and gather them.

    Args:
        q: float32 [B * S, K * G * D], rotated, not scaled.
        keys, values: the cache, the step's tokens and all heads included; [B, all heads, C, columns].
        means, variances: float32 [B, K, N, D].
    """
    w, sizes, rule, layer = b.write, b.sizes, b.sizes.rule, part.layer
    heads, columns, width = len(part.heads), layer.cache.head_dim, layer.cache.value_dim
    window = layer.window(sizes.positions)
    blocks = w("Div", b.far_end, w.ints(BLOCK))
    inside = w("Add", w("Unsqueeze", blocks, w.ints([2])), w.constant(np.arange(sizes.local + 1, dtype=np.int64)))
    inside = w("Unsqueeze", w("Min", inside, w.ints(sizes.positions // BLOCK - 1)), w.ints([1]))  # [B, 1, NB, blocks]
    near_rows = b.rows_of_cache(inside, part, sizes.positions // BLOCK)

    def gathered(cache: ir.Value, rows: ir.Value, together: int, dims: int, most: int) -> ir.Value:
        """Rows of `together` positions each, as [B, K, NB, most, dims]."""
        flat = w("Gather", w("Reshape", cache, w.ints([-1, together * dims])), rows, axis=0)
        return w("Reshape", flat, b.shape(b.batch, heads, b.blocks, most, dims))

    near_keys = gathered(keys, near_rows, BLOCK, columns, sizes.near)
    far, taken = _choice(b, layer, q, near_keys, means, variances, window)  # int64, bool [B, K, NB, F]
    far_rows = b.rows_of_cache(far, part, sizes.positions // rule.unit)
    most = sizes.far * rule.unit
    parts = [
        w("Concat", gathered(cache, far_rows, rule.unit, dims, most), near, axis=3)
        for cache, dims, near in (
            (keys, columns, near_keys),
            (values, width, gathered(values, near_rows, BLOCK, width, sizes.near)),
        )
    ]
    seen = _seen(b, far, taken, window)
    flat = [
        w("Reshape", x, w.ints([-1, 1, most + sizes.near, d])) for x, d in zip(parts, (columns, width), strict=True)
    ]
    mask = w("Reshape", seen, b.shape(-1, 1, b.places, most + sizes.near))
    return ReadBlocks(flat[0], flat[1], mask)


def _near_positions(b: Blocks) -> ir.Value:
    """int64 [B, NB, L]."""
    w = b.write
    return w("Add", w("Unsqueeze", b.far_end, w.ints([2])), w.constant(np.arange(b.sizes.near, dtype=np.int64)))


def _seen(b: Blocks, far: ir.Value, taken: ir.Value, window: int) -> ir.Value:
    """bool [B, K, NB, W, F * unit + L]."""
    w, unit, sizes = b.write, b.sizes.rule.unit, b.sizes
    heads = w.ints([1])
    first = w("Unsqueeze", w("Mul", far, w.ints(unit)), w.ints([4]))
    at = w("Add", first, w.constant(np.arange(unit, dtype=np.int64)))  # [B, K, NB, F, unit]
    flat = b.shape(0, 0, 0, 1, sizes.far * unit)
    at = w("Reshape", at, flat)
    position = w("Unsqueeze", w("Unsqueeze", b.position, heads), w.ints([4]))  # [B, 1, NB, W, 1]
    chosen = w("Expand", w("Unsqueeze", taken, w.ints([4])), w.ints([1, 1, 1, 1, unit]))
    chosen = w("Reshape", chosen, flat)
    start = b.first_seen(position, window)
    far_seen = w("And", chosen, w("GreaterOrEqual", at, start, dtype=BOOL))
    near_at = w("Unsqueeze", w("Unsqueeze", _near_positions(b), heads), w.ints([3]))  # [B, 1, NB, 1, L]
    near_seen = w(
        "And", w("LessOrEqual", near_at, position, dtype=BOOL), w("GreaterOrEqual", near_at, start, dtype=BOOL)
    )
    both = w("Shape", taken, dtype=INT64)
    three = w("Slice", both, w.ints([0]), w.ints([3]), w.ints([0]))
    far_seen = w("Expand", far_seen, w("Concat", three, b.places, w.ints([sizes.far * unit]), axis=0))
    near_seen = w("Expand", near_seen, w("Concat", three, b.places, w.ints([sizes.near]), axis=0))
    return w("Concat", far_seen, near_seen, axis=4)


def _choice(
    b: Blocks,
    layer: LayerAttention,
    q: ir.Value,
    near_keys: ir.Value,
    means: ir.Value,
    variances: ir.Value,
    window: int,
) -> tuple[ir.Value, ir.Value]:
    """Units before the local window, int64 [B, K, NB, F], and whether each is read, bool."""
    w, sizes, rule = b.write, b.sizes, b.sizes.rule
    scores = _scores(b, layer, q, near_keys, means, variances, window)  # [B, K, NB, U]
    unit = np.arange(sizes.units, dtype=np.int64) * rule.unit
    far_end = w("Unsqueeze", w("Unsqueeze", b.far_end, w.ints([1])), w.ints([3]))  # [B, 1, NB, 1]
    far = w("Less", w.constant(unit), far_end, dtype=BOOL)
    first = w.constant(unit < BLOCK)
    forced = w("And", far, first)
    scores = w("Where", forced, w.number(FORCED, FLOAT), scores, dtype=FLOAT)
    values, places = w.several("TopK", scores, w.ints([sizes.far]), dtypes=(FLOAT, INT64), axis=-1, largest=1, sorted=1)
    rank = w.constant(np.arange(sizes.far, dtype=np.int64))
    taken = w("And", w("Less", rank, w.ints(rule.top_k + BLOCK // rule.unit), dtype=BOOL),
              w("Greater", values, w.number(0.0, FLOAT), dtype=BOOL))  # fmt: skip
    begin, end = (w("Unsqueeze", w("Unsqueeze", x, w.ints([1])), w.ints([3])) for x in (b.begin, b.end))
    start = b.first_seen(begin, window)
    dense = w("Less", end, w.ints(rule.dense_below), dtype=BOOL)  # [B, 1, NB, 1]
    if sizes.dense_by_density:
        begins = w("Mul", places, w.ints(rule.unit))
        visible = w("Sub", w("Add", begins, w.ints(rule.unit)), w("Max", begins, start))
        visible = w("Max", visible, w.ints(0))
        far_read = w("ReduceSum", w("Mul", visible, w.cast(taken, INT64)), w.ints([-1]), keepdims=1)
        near_read = w("Sub", w("Add", end, w.ints(1)), w("Max", far_end, start))
        reads = w("Mul", w("Add", far_read, near_read), w.ints(DENSE_ABOVE[1]))
        sees = w("Mul", w("Sub", w("Add", end, w.ints(1)), start), w.ints(DENSE_ABOVE[0]))
        dense = w("Or", dense, w("Greater", reads, sees, dtype=BOOL), dtype=BOOL)  # [B, K, NB, 1]
    everything = w("Add", w("Div", start, w.ints(rule.unit)), rank)  # [B, 1, NB, F]
    places = w("Where", dense, everything, places, dtype=INT64)
    within = w("Less", w("Mul", everything, w.ints(rule.unit)), far_end, dtype=BOOL)
    taken = w("Or", w("And", dense, within), w("And", w("Not", dense), taken))
    return w("Min", places, w.ints(sizes.positions // rule.unit - 1)), taken


def _scores(
    b: Blocks,
    layer: LayerAttention,
    q: ir.Value,
    near_keys: ir.Value,
    means: ir.Value,
    variances: ir.Value,
    window: int,
) -> ir.Value:
    """float32 [B, K, NB, U]: root mean square of each unit's share of the mass; 0 from the local window on."""
    w, sizes, rule = b.write, b.sizes, b.sizes.rule
    cache = layer.cache
    heads, group, columns = cache.kv_heads, cache.q_heads // cache.kv_heads, cache.head_dim
    queries = w("Gather", q, b.look_rows, axis=0)
    queries = w("Mul", queries, w.number(layer.scale, FLOAT))
    queries = w("Reshape", queries, b.shape(b.batch, b.blocks, b.looked, heads, group, columns))
    queries = w("Transpose", queries, perm=[0, 3, 1, 2, 4, 5])  # [B, K, NB, R, G, D]
    together = w("Reshape", queries, b.shape(b.batch, heads, -1, columns))  # [B, K, NB * R * G, D]

    def by_node(x: ir.Value, nodes: ir.Value) -> ir.Value:
        # The nodes are the left operand: TensorRT would copy all of them to transpose them.
        product = w("Transpose", w("MatMul", nodes, w("Transpose", x, perm=[0, 1, 3, 2])), perm=[0, 1, 3, 2])
        return w("Reshape", product, b.shape(b.batch, heads, b.blocks, b.looked, group, sizes.nodes))

    logits = by_node(together, means)
    more = w("Mul", by_node(w("Mul", together, together), variances), w.number(0.5 * VARIANCE_WEIGHT, FLOAT))
    logits = w.softcapped(w("Add", logits, w("Min", more, w.number(VARIANCE_CAP, FLOAT))), layer.softcap)

    row = w("Unsqueeze", b.look, w.ints([1, 4, 5]))  # [B, 1, NB, R, 1, 1]
    start = b.first_seen(row, window)
    far_end = w("Unsqueeze", b.far_end, w.ints([1, 3, 4, 5]))
    begins = np.arange(sizes.nodes, dtype=np.int64) * rule.node
    visible = w("And", w("Less", w.constant(begins), far_end, dtype=BOOL),
                w("Greater", w.constant(begins + rule.node), start, dtype=BOOL))  # fmt: skip
    least = w.number(LEAST, FLOAT)
    logits = w("Where", visible, logits, least, dtype=FLOAT)

    flat = w("Reshape", queries, b.shape(b.batch, heads, b.blocks, -1, columns))
    near = w("MatMul", flat, w("Transpose", w.cast(near_keys, FLOAT), perm=[0, 1, 2, 4, 3]))
    near = w("Reshape", near, b.shape(b.batch, heads, b.blocks, b.looked, group, sizes.near))
    near = w.softcapped(near, layer.softcap)
    at = w("Unsqueeze", _near_positions(b), w.ints([1, 3, 4]))  # [B, 1, NB, 1, 1, L]
    near_seen = w("And", w("LessOrEqual", at, row, dtype=BOOL), w("GreaterOrEqual", at, start, dtype=BOOL))
    near = w("Where", near_seen, near, least, dtype=FLOAT)

    top = w("Max", w("ReduceMax", logits, w.ints([-1]), keepdims=1), w("ReduceMax", near, w.ints([-1]), keepdims=1))
    sink = None
    if layer.sinks is not None:
        sink = w.constant(np.asarray(layer.sinks, np.float32).reshape(1, heads, 1, 1, group, 1))
        top = w("Max", top, sink)
    mass = w("Mul", w("Exp", w("Sub", logits, top)), w.number(float(rule.node), FLOAT))
    by_unit = b.shape(b.batch, heads, b.blocks, b.looked, group, sizes.units, rule.unit // rule.node)
    mass = w("Reshape", mass, by_unit)
    mass = w("ReduceSum", mass, w.ints([-1]), keepdims=0)  # [B, K, NB, R, G, U]
    # One sum over both: TensorRT's compiler fails on the sum of two sums (tensorrt-rtx 1.7).
    total = w("ReduceSum", w("Concat", mass, w("Exp", w("Sub", near, top)), axis=5), w.ints([-1]), keepdims=1)
    if sink is not None:
        total = w("Add", total, w("Exp", w("Sub", sink, top)))
    share = w("Div", mass, total)
    counts = w.cast(w("Unsqueeze", b.is_looked, w.ints([1, 4, 5])), FLOAT)  # [B, 1, NB, R, 1, 1]
    squares = w("ReduceSum", w("Mul", w("Mul", share, share), counts), w.ints([3, 4]), keepdims=0)
    number = w("Mul", w("ReduceSum", counts, w.ints([3, 4]), keepdims=0), w.number(float(group), FLOAT))
    return w("Sqrt", w("Div", squares, number))


def grid(b: Blocks, part: SparseHeads, q: ir.Value) -> ir.Value:
    """Queries [B * S, K * G * D] in their blocks: [B * K * NB, G, W, D]."""
    w, cache = b.write, part.layer.cache
    group = cache.q_heads // cache.kv_heads
    placed = w("Gather", q, b.rows, axis=0)
    placed = w("Reshape", placed, b.shape(b.batch, b.blocks, b.places, cache.kv_heads, group, cache.head_dim))
    turned = w("Transpose", placed, perm=[0, 3, 1, 4, 2, 5])
    return w("Reshape", turned, b.shape(-1, group, b.places, cache.head_dim))


def ungrid(b: Blocks, part: SparseHeads, out: ir.Value) -> ir.Value:
    """The inverse of `grid`, for values: [B * S, K * G * value columns]."""
    w, cache = b.write, part.layer.cache
    group = cache.q_heads // cache.kv_heads
    split = w("Reshape", out, b.shape(b.batch, cache.kv_heads, b.blocks, group, b.places, cache.value_dim))
    turned = w("Transpose", split, perm=[0, 2, 4, 1, 3, 5])
    return w("Gather", w("Reshape", turned, w.ints([-1, cache.q_heads * cache.value_dim])), b.back, axis=0)
