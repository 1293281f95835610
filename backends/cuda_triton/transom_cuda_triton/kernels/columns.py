"""Selects columns: for each KV head, the keys with the largest attention mass over some queries of a sequence.

Q [tokens, kv_heads * group, head_dim], rotated; K, PAGES, SLOTS, COVERAGE, RING, COLUMNS, PATCHES, SIDES and FLAG as in
`transom_cuda_triton.kernels` and `.routed`. CHOOSERS int32 [choosers] has the sequences whose columns are selected,
each once, or -1. SAMPLED int32 [choosers, 16, 3] has the sampled queries of each: the row among the step's tokens or
-1, the place in the ring or -1, and the position, which is -1 in unused entries.

Four kernels, the first and the third split over the keys:

1. `weigh_rows`, grid (choosers, kv_heads, splits * tiles), tiles = ceil(16 * group / ROWS), computes the largest logit
   and the sum for each row of queries and split: COLUMN_STATS float32 [choosers, kv_heads, splits, 2, tiles * ROWS].
2. `merge_columns`, grid (choosers, kv_heads), computes the logarithm of each row's total sum, including the sink:
   COLUMN_NORMS float32 [choosers, kv_heads, tiles * ROWS].
3. `sum_mass`, grid (choosers, kv_heads, splits), sums the mass of each key over all rows, except over rows whose own
   block or local window has the key: MASS float32 [choosers, kv_heads, most_keys]. Only keys that are visible to some
   row are written.
4. `choose_columns`, grid (choosers, kv_heads), writes COLUMNS and PATCHES, and removes the nodes of earlier columns
   from SIDES.

Logits are computed twice, not stored: each key would need 16 * group floats, and itself has only 2 * head_dim bytes.

Source: SnapKV, Li and others 2024 (arXiv:2404.14469), for selecting keys by the mass that a few queries give them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from transom_cuda_triton.kernels.largest import beyond, edge
from transom_cuda_triton.kernels.routed import (
    MOST_COLUMNS,
    NODE,
    far_end,
    first_seen,
    key_logits,
    rescale,
    weights,
)
from transom_cuda_triton.kernels.softmax import LOG2E, NEVER, PAGE, load_rows

SAMPLED_ROWS = tl.constexpr(16)


@triton.jit
def _span(SAMPLED, chooser, local, window, WINDOWED: tl.constexpr):
    """(first tile with keys visible to any row, last position of a row or -1, end of the keys that may be columns)."""
    position = tl.load(SAMPLED + (chooser * SAMPLED_ROWS + tl.arange(0, SAMPLED_ROWS)) * 3 + 2)
    last = tl.max(position, 0)
    first = tl.min(tl.where(position >= 0, position, last), 0)
    return first_seen(first, window, WINDOWED) // PAGE, last, far_end(last, local)


@triton.jit
def _rows(
    Q, RING, SAMPLED, chooser, head, slot, row, q_token,
    GROUP: tl.constexpr, HEAD: tl.constexpr, HEAD_REST: tl.constexpr,
):  # fmt: skip
    """(queries [ROWS, HEAD], [ROWS, HEAD_REST], positions [ROWS] or -1) of rows, each a sampled query with one head."""
    head_dim: tl.constexpr = HEAD + HEAD_REST
    entry = SAMPLED + (chooser * SAMPLED_ROWS + row // GROUP) * 3
    real = row < SAMPLED_ROWS * GROUP
    source = tl.load(entry, mask=real, other=-1).to(tl.int64)
    place = tl.load(entry + 1, mask=real, other=-1).to(tl.int64)
    position = tl.load(entry + 2, mask=real, other=-1)
    member = head * GROUP + row % GROUP
    new, old = (position >= 0) & (source >= 0), (position >= 0) & (source < 0)
    qa, qb = load_rows(Q, source * q_token + member * head_dim, new, HEAD, HEAD_REST, True)
    width = tl.num_programs(1) * GROUP * head_dim
    at = (slot * SAMPLED_ROWS + place) * width + member * head_dim
    ra, rb = load_rows(RING, at, old, HEAD, HEAD_REST, True)
    return tl.where(new[:, None], qa, ra), tl.where(new[:, None], qb, rb), position


@triton.jit
def weigh_rows(
    Q, K, RING, PAGES, SLOTS, COVERAGE, CHOOSERS, SAMPLED, COLUMN_STATS,
    factor, cap, window, local, q_token, k_page, k_head, most_pages, column_splits,
    GROUP: tl.constexpr, HEAD: tl.constexpr, HEAD_REST: tl.constexpr, ROWS: tl.constexpr,
    CAPPED: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """See the module."""
    chooser, head = tl.program_id(0), tl.program_id(1)
    split, tile = tl.program_id(2) % column_splits, tl.program_id(2) // column_splits
    tiles = tl.num_programs(2) // column_splits
    kv_heads = tl.num_programs(1)
    sequence = tl.load(CHOOSERS + chooser)
    first_tile, last, limit = _span(SAMPLED, chooser, local, window, WINDOWED)
    if (sequence < 0) | (limit <= 0) | (tl.load(COVERAGE + head) < 0.0):
        return
    slot = tl.load(SLOTS + sequence)
    row = tile * ROWS + tl.arange(0, ROWS)
    qa, qb, position = _rows(Q, RING, SAMPLED, chooser, head, slot, row, q_token, GROUP, HEAD, HEAD_REST)
    pages, keys = PAGES + sequence * most_pages, K + head.to(tl.int64) * k_head
    top, total = tl.full([ROWS], NEVER, tl.float32), tl.zeros([ROWS], tl.float32)
    key_tiles = last // PAGE + 1 - first_tile
    begin = first_tile + key_tiles * split // column_splits
    end = first_tile + key_tiles * (split + 1) // column_splits
    for number in range(begin, end):
        at = number * PAGE + tl.arange(0, PAGE)
        s = key_logits(qa, qb, keys, pages, at, at <= last, k_page, factor, cap, HEAD, HEAD_REST, CAPPED)
        seen = at[None, :] <= position[:, None]
        if WINDOWED:
            seen = seen & (position[:, None] - at[None, :] < window)
        top, keep, p = rescale(top, s, seen)
        total = total * keep + tl.sum(p, 1)
    part = ((chooser * kv_heads + head) * column_splits + split).to(tl.int64) * 2
    width = tiles * ROWS
    tl.store(COLUMN_STATS + part * width + row, top)
    tl.store(COLUMN_STATS + (part + 1) * width + row, total)


@triton.jit
def merge_columns(
    SAMPLED, CHOOSERS, COVERAGE, SINKS, COLUMN_STATS, COLUMN_NORMS, local, window, column_splits,
    GROUP: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr, WINDOWED: tl.constexpr, WITH_SINKS: tl.constexpr,
):  # fmt: skip
    """See the module. SPLITS is a power of two, at least column_splits."""
    chooser, head = tl.program_id(0), tl.program_id(1)
    kv_heads = tl.num_programs(1)
    _, _, limit = _span(SAMPLED, chooser, local, window, WINDOWED)
    if (tl.load(CHOOSERS + chooser) < 0) | (limit <= 0) | (tl.load(COVERAGE + head) < 0.0):
        return
    tiles: tl.constexpr = (SAMPLED_ROWS * GROUP + ROWS - 1) // ROWS
    width: tl.constexpr = tiles * ROWS
    own = (chooser * kv_heads + head).to(tl.int64)
    split = tl.arange(0, SPLITS)
    there = (split < column_splits)[:, None]
    for tile in range(tiles):
        row = tile * ROWS + tl.arange(0, ROWS)
        at = COLUMN_STATS + (own * column_splits + split[:, None]) * (2 * width) + row[None, :]
        tops = tl.load(at, mask=there, other=NEVER)
        top = tl.max(tops, 0)
        if WITH_SINKS:
            sink = tl.load(SINKS + head * GROUP + row % GROUP) * LOG2E
            top = tl.maximum(top, sink)
        total = tl.sum(tl.load(at + width, mask=there, other=0.0) * tl.exp2(tops - top[None, :]), 0)
        if WITH_SINKS:
            total += tl.exp2(sink - top)
        tl.store(COLUMN_NORMS + own * width + row, top + tl.log2(total))


@triton.jit
def sum_mass(
    Q, K, RING, PAGES, SLOTS, COVERAGE, CHOOSERS, SAMPLED, COLUMN_NORMS, MASS,
    factor, cap, window, local, q_token, k_page, k_head, most_pages, most_keys,
    GROUP: tl.constexpr, HEAD: tl.constexpr, HEAD_REST: tl.constexpr, ROWS: tl.constexpr,
    CAPPED: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """See the module. A program passes over its keys once per tile of rows, and accumulates in MASS."""
    chooser, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_heads, splits = tl.num_programs(1), tl.num_programs(2)
    sequence = tl.load(CHOOSERS + chooser)
    first_tile, _, limit = _span(SAMPLED, chooser, local, window, WINDOWED)
    if (sequence < 0) | (limit <= 0) | (tl.load(COVERAGE + head) < 0.0):
        return
    slot = tl.load(SLOTS + sequence)
    pages, keys = PAGES + sequence * most_pages, K + head.to(tl.int64) * k_head
    tiles: tl.constexpr = (SAMPLED_ROWS * GROUP + ROWS - 1) // ROWS
    own = (chooser * kv_heads + head).to(tl.int64)
    key_tiles = tl.maximum(limit // PAGE - first_tile, 0)
    for tile in range(tiles):
        row = tile * ROWS + tl.arange(0, ROWS)
        qa, qb, position = _rows(Q, RING, SAMPLED, chooser, head, slot, row, q_token, GROUP, HEAD, HEAD_REST)
        norm = tl.load(COLUMN_NORMS + own * (tiles * ROWS) + row)
        ends = tl.where(position >= 0, far_end(position, local), 0)
        for number in range(first_tile + key_tiles * split // splits, first_tile + key_tiles * (split + 1) // splits):
            at = number * PAGE + tl.arange(0, PAGE)
            s = key_logits(qa, qb, keys, pages, at, at < limit, k_page, factor, cap, HEAD, HEAD_REST, CAPPED)
            seen = at[None, :] < ends[:, None]
            if WINDOWED:
                seen = seen & (position[:, None] - at[None, :] < window)
            mass = tl.sum(weights(s, norm, seen), 0)
            to = MASS + own * most_keys + at
            mass += tl.load(to, mask=tile + 0 * at > 0, other=0.0)
            tl.store(to, mass)
        tl.debug_barrier()


@triton.jit
def choose_columns(
    SLOTS, COVERAGE, CHOOSERS, SAMPLED, MASS, COLUMNS, PATCHES, SIDES, FLAG,
    local, window, most_columns, most_keys, most_nodes,
    WIDTH: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """See the module. WIDTH keys, a multiple of 8, are processed at once."""
    chooser, head = tl.program_id(0), tl.program_id(1)
    kv_heads = tl.num_programs(1)
    sequence = tl.load(CHOOSERS + chooser)
    if (sequence < 0) | (tl.load(COVERAGE + head) < 0.0):
        return
    first_tile, _, limit = _span(SAMPLED, chooser, local, window, WINDOWED)
    own = tl.load(SLOTS + sequence) * kv_heads + head
    lane = tl.arange(0, MOST_COLUMNS)
    earlier = tl.load(PATCHES + own * MOST_COLUMNS + lane)
    nothing = tl.full([MOST_COLUMNS], -1, tl.int8)
    tl.store(SIDES + own.to(tl.int64) * most_nodes + earlier, nothing, mask=earlier >= 0)
    tl.debug_barrier()  # PATCHES is overwritten below

    mass = MASS + (chooser * kv_heads + head).to(tl.int64) * most_keys
    first = first_tile * PAGE
    at = tl.arange(0, WIDTH)
    wrong = tl.zeros([WIDTH], tl.int32)
    for start in range(first, limit, WIDTH):
        x = tl.load(mass + start + at, mask=start + at < limit, other=0.0)
        wrong += tl.where((x >= 0.0) & (x < float("inf")), 0, 1)
    if tl.max(wrong, 0) > 0:
        tl.atomic_or(FLAG, 1)
        limit = first
    low, high, end = edge(mass, first, limit, most_columns, most_columns, 0.0, WIDTH)
    columns, patches = first * 0, first * 0
    for start in range(first, limit, WIDTH):
        key = start + at
        taken = beyond(tl.load(mass + key, mask=key < limit, other=0.0), key, low, high, end).to(tl.int32)
        place = columns + tl.cumsum(taken, 0) - 1
        tl.store(COLUMNS + own * MOST_COLUMNS + place, key, mask=taken > 0)
        columns += tl.sum(taken, 0)
        held = tl.max(tl.reshape(taken, [WIDTH // NODE, NODE]), 1)
        place = patches + tl.cumsum(held, 0) - 1
        node = start // NODE + tl.arange(0, WIDTH // NODE)
        tl.store(PATCHES + own * MOST_COLUMNS + place, node, mask=held > 0)
        patches += tl.sum(held, 0)
    none = tl.full([MOST_COLUMNS], -1, tl.int32)
    tl.store(COLUMNS + own * MOST_COLUMNS + lane, none, mask=lane >= columns)
    tl.store(PATCHES + own * MOST_COLUMNS + lane, none, mask=lane >= patches)
