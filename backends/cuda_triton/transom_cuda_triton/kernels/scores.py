"""Scores the far units of query blocks: the estimated share of attention mass that each unit receives.

Q [tokens, kv_heads * group, head_dim], rotated; K, BLOCKS, PAGES, SLOTS, COVERAGE, MEANS, VARIANCES, COUNTS, COLUMNS
and SIDES as in `transom_cuda_triton.kernels` and `.routed`. A row is a sampled query with one head of the group: query
r // group, head r % group.

1. `measure_rows`, grid (blocks, kv_heads, splits * tiles), tiles = ceil(sampled queries * group / ROWS), computes for
   each row and split the largest logit and, relative to it, the masses of far nodes, near keys and columns: STATS
   float32 [blocks, kv_heads, splits, 4, row_width]. The tiles of far nodes, near keys and columns, in this order, are
   divided evenly among the splits. With KEPT, which requires blocks of a single query, it also stores the masses of
   units, as logarithms: MASSES float32 [blocks, kv_heads, group, most_units].
2. `merge_rows`, grid (blocks, kv_heads), computes NORMS float32 [blocks, kv_heads, row_width], the logarithm of each
   row's total mass including the sink, and SHARES float32 [blocks, kv_heads, 2], the score of the near keys and the
   share of the columns.
3. `score_units`, grid (blocks, kv_heads, splits), computes SCORES float32 [blocks, kv_heads, most_units], for units of
   UNIT keys.

For a block of 64 queries the masses are computed twice, because storing them costs more than the second product. For a
single query the cost is in reading the nodes, and KEPT reads them only once.

Source: `transom.ops.sparse_routing`, steps 4 and 5.
"""

from __future__ import annotations

import triton
import triton.language as tl

from transom_cuda_triton.kernels.routed import (
    MOST_COLUMNS,
    NODE,
    NODES,
    VARIANCE_CAP,
    VARIANCE_WEIGHT,
    extent,
    key_logits,
    powers,
    products,
    rescale,
    sampled_queries,
    weights,
)
from transom_cuda_triton.kernels.softmax import LOG2E, NEVER, PAGE, load_rows


@triton.jit
def _rows(
    Q, head, first_row, first, count, stride, row, q_token,
    GROUP: tl.constexpr, HEAD: tl.constexpr, HEAD_REST: tl.constexpr,
):  # fmt: skip
    """(queries [ROWS, HEAD], [ROWS, HEAD_REST], positions [ROWS], whether each row exists) of rows of a block."""
    real = row < sampled_queries(count, stride) * GROUP
    query = tl.minimum((row // GROUP + 1) * stride, count) - 1
    at = (first_row + query).to(tl.int64) * q_token + (head * GROUP + row % GROUP) * (HEAD + HEAD_REST)
    qa, qb = load_rows(Q, at, real, HEAD, HEAD_REST, True)
    return qa, qb, first + query, real


@triton.jit
def _squares(q, factor):
    x = q.to(tl.float32) * factor
    return (x * x).to(q.dtype)


@triton.jit
def node_logits(
    qa, qb, sa, sb, position, real, MEANS, VARIANCES, COUNTS, pages, sides, node, far, head, kv_heads, spare,
    most_columns, factor, cap, window,
    HEAD: tl.constexpr, HEAD_REST: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """(estimated logits [ROWS, NODES], number of keys of each node [NODES], visible nodes [ROWS, NODES]).

    `spare` is the first page of the slot's side nodes.
    """
    there = node * NODE < far
    page = tl.load(pages + node * NODE // PAGE, mask=there, other=0)
    side = tl.load(sides + node, mask=there & (most_columns + 0 * node > 0), other=-1).to(tl.int32)
    place = tl.where(side >= 0, side, node) % (PAGE // NODE)
    page = tl.where(side >= 0, spare + side // (PAGE // NODE), page)
    row = (page.to(tl.int64) * kv_heads + head) * (PAGE // NODE) + place
    count = tl.load(COUNTS + row, mask=there, other=0)
    va, vb = load_rows(VARIANCES, row * (HEAD + HEAD_REST), there, HEAD, HEAD_REST, True)
    more = products(sa, sb, va, vb, HEAD_REST) * (0.5 * VARIANCE_WEIGHT)
    ma, mb = load_rows(MEANS, row * (HEAD + HEAD_REST), there, HEAD, HEAD_REST, True)
    s = products(qa, qb, ma, mb, HEAD_REST) * factor
    # A NaN must stay NaN; tl.minimum would hide it.
    s = powers(s + tl.where(more > VARIANCE_CAP, VARIANCE_CAP, more), cap, CAPPED)
    seen = real[:, None] & (count > 0)[None, :]
    if WINDOWED:
        seen = seen & (node[None, :] * NODE + NODE > position[:, None] - window + 1)
    return s, count.to(tl.float32), seen


@triton.jit
def _unit_sums(p, ROWS: tl.constexpr, UNIT: tl.constexpr):
    """Masses of units [ROWS, units] from masses of nodes [ROWS, NODES]."""
    per: tl.constexpr = UNIT // NODE
    units: tl.constexpr = NODES // per
    return tl.sum(tl.reshape(p, [ROWS, units, per]), 2)


@triton.jit
def measure_rows(
    Q, K, MEANS, VARIANCES, COUNTS, BLOCKS, PAGES, SLOTS, COVERAGE, COLUMNS, SIDES, STATS, MASSES,
    factor, cap, window, stride, local, most_columns, dense_below, cache_pages,
    q_token, k_page, k_head, most_pages, most_nodes, most_units, row_width, splits,
    GROUP: tl.constexpr, HEAD: tl.constexpr, HEAD_REST: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr,
    KEPT: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """See the module."""
    block, head = tl.program_id(0), tl.program_id(1)
    split, row_tile = tl.program_id(2) % splits, tl.program_id(2) // splits
    kv_heads = tl.num_programs(1)
    sequence, slot, first_row, first, count, start, far = extent(
        BLOCKS, SLOTS, COVERAGE, block, head, window, local, dense_below, WINDOWED
    )
    if (far == 0) | (row_tile * ROWS >= sampled_queries(count, stride) * GROUP):
        return
    row = row_tile * ROWS + tl.arange(0, ROWS)
    qa, qb, position, real = _rows(Q, head, first_row, first, count, stride, row, q_token, GROUP, HEAD, HEAD_REST)
    pages, keys = PAGES + sequence * most_pages, K + head.to(tl.int64) * k_head
    own = slot * kv_heads + head
    sides = SIDES + own.to(tl.int64) * most_nodes
    spare = cache_pages + slot * (MOST_COLUMNS // (PAGE // NODE))
    at_block = (block * kv_heads + head).to(tl.int64)
    top = tl.full([ROWS], NEVER, tl.float32)
    far_mass, near_mass = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    column_mass = tl.zeros([ROWS], tl.float32)

    first_tile = start // (NODES * NODE)
    far_tiles = (far + NODES * NODE - 1) // (NODES * NODE) - first_tile
    last = first + count - 1
    near_tiles = (last - far) // PAGE + 1
    tiles = far_tiles + near_tiles + tl.where(most_columns > 0, 1, 0)
    begin, end = tiles * split // splits, tiles * (split + 1) // splits

    sa, sb = _squares(qa, factor), _squares(qb, factor)
    for tile in range(begin, tl.minimum(end, far_tiles)):
        node = (first_tile + tile) * NODES + tl.arange(0, NODES)
        s, keys_in, seen = node_logits(
            qa, qb, sa, sb, position, real, MEANS, VARIANCES, COUNTS, pages, sides, node, far, head, kv_heads, spare,
            most_columns, factor, cap, window, HEAD, HEAD_REST, CAPPED, WINDOWED,
        )  # fmt: skip
        top, keep, p = rescale(top, s, seen)
        p = p * keys_in[None, :]
        far_mass = far_mass * keep + tl.sum(p, 1)
        if KEPT:
            unit = (first_tile + tile) * (NODES * NODE // UNIT) + tl.arange(0, NODES * NODE // UNIT)
            to = MASSES + (at_block * GROUP + row[:, None]) * most_units + unit[None, :]
            mass = tl.log2(_unit_sums(p, ROWS, UNIT)) + top[:, None]
            tl.store(to, mass, mask=real[:, None] & (unit * UNIT < far)[None, :])

    slots = tl.arange(0, PAGE)
    for tile in range(tl.maximum(begin, far_tiles), end):
        number = tile - far_tiles + 0 * slots
        single = number == near_tiles
        at = far + number * PAGE + slots
        column = tl.load(COLUMNS + own * MOST_COLUMNS + slots, mask=single & (slots < most_columns), other=-1)
        at = tl.where(single, tl.where(column < far, column, -1), at)
        there = (at >= 0) & (at <= last)
        s = key_logits(qa, qb, keys, pages, at, there, k_page, factor, cap, HEAD, HEAD_REST, CAPPED)
        seen = real[:, None] & there[None, :] & (at[None, :] <= position[:, None])
        if WINDOWED:
            seen = seen & (position[:, None] - at[None, :] < window)
        top, keep, p = rescale(top, s, seen)
        far_mass = far_mass * keep
        near_mass = near_mass * keep + tl.sum(tl.where(single[None, :], 0.0, p), 1)
        column_mass = column_mass * keep + tl.sum(tl.where(single[None, :], p, 0.0), 1)

    to = STATS + (at_block * splits + split) * (4 * row_width) + row
    tl.store(to, top)
    tl.store(to + row_width, far_mass)
    tl.store(to + 2 * row_width, near_mass)
    tl.store(to + 3 * row_width, column_mass)


@triton.jit
def merge_rows(
    BLOCKS, SLOTS, COVERAGE, SINKS, STATS, NORMS, SHARES,
    window, stride, local, dense_below, row_width, splits,
    GROUP: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr, WINDOWED: tl.constexpr, WITH_SINKS: tl.constexpr,
):  # fmt: skip
    """See the module. SPLITS is a power of two, at least splits."""
    block, head = tl.program_id(0), tl.program_id(1)
    kv_heads = tl.num_programs(1)
    _, _, _, _, count, _, far = extent(BLOCKS, SLOTS, COVERAGE, block, head, window, local, dense_below, WINDOWED)
    if far == 0:
        return
    rows = sampled_queries(count, stride) * GROUP
    own = (block * kv_heads + head).to(tl.int64)
    split = tl.arange(0, SPLITS)
    near_squares, column_sum = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        real = row < rows
        there = (split < splits)[:, None] & real[None, :]
        at = STATS + (own * splits + split[:, None]) * (4 * row_width) + row[None, :]
        tops = tl.load(at, mask=there, other=NEVER)
        top = tl.max(tops, 0)
        if WITH_SINKS:
            sink = tl.load(SINKS + head * GROUP + row % GROUP) * LOG2E
            top = tl.maximum(top, sink)
        weight = tl.exp2(tops - top[None, :])
        near = tl.sum(tl.load(at + 2 * row_width, mask=there, other=0.0) * weight, 0)
        column = tl.sum(tl.load(at + 3 * row_width, mask=there, other=0.0) * weight, 0)
        total = tl.sum(tl.load(at + row_width, mask=there, other=0.0) * weight, 0) + near + column
        if WITH_SINKS:
            total += tl.exp2(sink - top)
        total = tl.where(real, total, 1.0)
        tl.store(NORMS + own * row_width + row, top + tl.log2(total), mask=real)
        near_squares += (near / total) * (near / total)
        column_sum += column / total
    tl.store(SHARES + own * 2, tl.sqrt(tl.sum(near_squares, 0) / rows))
    tl.store(SHARES + own * 2 + 1, tl.sum(column_sum, 0) / rows)


@triton.jit
def score_units(
    Q, MEANS, VARIANCES, COUNTS, BLOCKS, PAGES, SLOTS, COVERAGE, SIDES, MASSES, NORMS, SCORES,
    factor, cap, window, stride, local, most_columns, dense_below, cache_pages,
    q_token, most_pages, most_nodes, most_units, row_width,
    GROUP: tl.constexpr, HEAD: tl.constexpr, HEAD_REST: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr,
    KEPT: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """See the module. A program passes over its units once per tile of rows, and accumulates in SCORES."""
    block, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_heads, splits = tl.num_programs(1), tl.num_programs(2)
    sequence, slot, first_row, first, count, start, far = extent(
        BLOCKS, SLOTS, COVERAGE, block, head, window, local, dense_below, WINDOWED
    )
    if far == 0:
        return
    units: tl.constexpr = NODES * NODE // UNIT
    rows = sampled_queries(count, stride) * GROUP
    pages = PAGES + sequence * most_pages
    sides = SIDES + (slot * kv_heads + head).to(tl.int64) * most_nodes
    spare = cache_pages + slot * (MOST_COLUMNS // (PAGE // NODE))
    own = (block * kv_heads + head).to(tl.int64)
    first_tile = start // (NODES * NODE)
    tiles = (far + NODES * NODE - 1) // (NODES * NODE) - first_tile
    begin, end = first_tile + tiles * split // splits, first_tile + tiles * (split + 1) // splits
    for row_start in range(0, rows, ROWS):
        row = row_start + tl.arange(0, ROWS)
        qa, qb, position, real = _rows(Q, head, first_row, first, count, stride, row, q_token, GROUP, HEAD, HEAD_REST)
        norm = tl.load(NORMS + own * row_width + row, mask=real, other=0.0)
        sa, sb = _squares(qa, factor), _squares(qb, factor)
        for tile in range(begin, end):
            unit = tile * units + tl.arange(0, units)
            inside = unit * UNIT < far
            if KEPT:
                at = MASSES + (own * GROUP + row[:, None]) * most_units + unit[None, :]
                mass = tl.load(at, mask=real[:, None] & inside[None, :], other=float("-inf"))
                share = tl.exp2(mass - norm[:, None])
            else:
                node = tile * NODES + tl.arange(0, NODES)
                s, keys_in, seen = node_logits(
                    qa, qb, sa, sb, position, real, MEANS, VARIANCES, COUNTS, pages, sides, node, far, head, kv_heads,
                    spare, most_columns, factor, cap, window, HEAD, HEAD_REST, CAPPED, WINDOWED,
                )  # fmt: skip
                p = weights(s, norm, seen) * keys_in[None, :]
                share = _unit_sums(p, ROWS, UNIT)
            to = SCORES + own * most_units + unit
            squares = tl.sum(share * share, 0)
            squares += tl.load(to, mask=inside & (row_start + 0 * unit > 0), other=0.0)
            final = row_start + 0 * unit + ROWS >= rows
            tl.store(to, tl.where(final, tl.sqrt(squares / rows), squares), mask=inside)
        tl.debug_barrier()
