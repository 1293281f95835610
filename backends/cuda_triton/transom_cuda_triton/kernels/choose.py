"""Selects the far units and columns that each query block reads, in the format of the attention kernels.

Inputs are SCORES float32 [blocks, kv_heads, most_units], for units of UNIT keys, and SHARES float32
[blocks, kv_heads, 2], both from `.scores`; BLOCKS, SLOTS, COVERAGE, COLUMNS and FLAG as in
`transom_cuda_triton.kernels.routed`. Outputs for attention are FAR int32 [blocks, kv_heads, most_far] in units of 16
keys, FAR_COUNT and NEAR int32 [blocks, kv_heads], and BLOCK_COLUMNS int32 [blocks, kv_heads, 64], which is COLUMNS in
`transom_cuda_triton.kernels`. Outputs for reports are READ and SEEN int32 [blocks, kv_heads]: the number of keys that
the last query reads, and of keys visible to any query of the block.

Grid (blocks, kv_heads). If `top_k` is above 0, that many units are selected. Otherwise the units with the highest
scores are selected until they cover `coverage` of the total, but no fewer than `min_density` and no more than
`max_density` of all units. If `may_fall` is 1, a block that would read more than 0.6 of its keys reads all of them. If
scores are not finite, FLAG is set and the block reads everything.

Source: `transom.ops.sparse_routing`, steps 6 and 7.
"""

from __future__ import annotations

import triton
import triton.language as tl

from transom_cuda_triton.kernels.largest import beyond, edge
from transom_cuda_triton.kernels.routed import MOST_COLUMNS, extent
from transom_cuda_triton.kernels.softmax import PAGE
from transom_cuda_triton.kernels.softmax import UNIT as FINEST


@triton.jit
def _sum(base, first, stop, WIDTH: tl.constexpr):
    at = tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float32)
    for start in range(first, stop, WIDTH):
        total += tl.load(base + start + at, mask=start + at < stop, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def choose_units(
    SCORES, SHARES, BLOCKS, SLOTS, COVERAGE, COLUMNS, FAR, FAR_COUNT, BLOCK_COLUMNS, NEAR, READ, SEEN, FLAG,
    window, local, most_columns, dense_below, top_k, min_density, max_density, may_fall, most_units, most_far,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """See the module. WIDTH units are processed at once."""
    block, head = tl.program_id(0), tl.program_id(1)
    kv_heads = tl.num_programs(1)
    own = (block * kv_heads + head).to(tl.int64)
    _, slot, _, first, count, start, far = extent(
        BLOCKS, SLOTS, COVERAGE, block, head, window, local, dense_below, WINDOWED
    )
    end = first + count - 1
    seen = tl.where(count > 0, end + 1 - start, 0)
    read = seen
    lane = tl.arange(0, MOST_COLUMNS)
    columns = tl.full([MOST_COLUMNS], -1, tl.int32)
    far_count = far * 0
    near_end = far
    if far > 0:
        scores = SCORES + own * most_units
        first_unit, units = start // UNIT, far // UNIT
        forced = tl.where(most_columns > 0, 0, PAGE // UNIT)
        free = tl.maximum(first_unit, forced)
        covered = tl.load(SHARES + own * 2) + tl.load(SHARES + own * 2 + 1)
        covered += _sum(scores, first_unit, tl.minimum(forced, units), WIDTH)
        total = covered + _sum(scores, free, units, WIDTH)
        if (total >= 0.0) & (total < float("inf")):
            every = end // UNIT - first_unit + 1
            always = end // UNIT - units + 1 + tl.maximum(forced - first_unit, 0)
            least = tl.maximum(tl.ceil(min_density * every.to(tl.float32)).to(tl.int32) - always, 0)
            most = tl.maximum(tl.floor(max_density * every.to(tl.float32)).to(tl.int32) - always, least)
            least, most = tl.where(top_k > 0, top_k, least), tl.where(top_k > 0, top_k, most)
            need = tl.load(COVERAGE + head) * total - covered
            low, high, last = edge(scores, free, units, least, most, need, WIDTH)

            at = tl.arange(0, WIDTH)
            read = end + 1 - far
            for begin in range(tl.where(forced > 0, 0, first_unit), units, WIDTH):
                unit = begin + at
                x = tl.load(scores + unit, mask=(unit >= free) & (unit < units), other=0.0)
                taken = (beyond(x, unit, low, high, last) | (unit < forced)).to(tl.int32)
                place = far_count + tl.cumsum(taken, 0) - 1
                for part in tl.static_range(UNIT // FINEST):
                    to = FAR + own * most_far + place * (UNIT // FINEST) + part
                    tl.store(to, unit * (UNIT // FINEST) + part, mask=taken > 0)
                far_count += tl.sum(taken, 0)
                inside = tl.maximum(unit * UNIT + UNIT - tl.maximum(unit * UNIT, start), 0)
                read += tl.sum(inside * taken, 0)
            column = tl.load(
                COLUMNS + (slot * kv_heads + head) * MOST_COLUMNS + lane, mask=lane < most_columns, other=-1
            )
            before = (column >= 0) & (column < far)
            unit = column // UNIT
            x = tl.load(scores + unit, mask=before & (unit >= free), other=0.0)
            alone = before & (beyond(x, unit, low, high, last) == 0)
            columns = tl.where(alone, column, -1)
            read += tl.sum((alone & (column >= start)).to(tl.int32), 0)
            # 3 / 5 in integers, as in the reference
            if (may_fall > 0) & (read * 5 > seen * 3):
                near_end = far * 0
        else:
            tl.atomic_or(FLAG, 1)
            near_end = far * 0
        if near_end == 0:
            read = seen
            far_count = far * 0
            columns = tl.full([MOST_COLUMNS], -1, tl.int32)
    tl.store(BLOCK_COLUMNS + own * MOST_COLUMNS + lane, columns)
    tl.store(FAR_COUNT + own, far_count * (UNIT // FINEST))
    tl.store(NEAR + own, near_end)
    tl.store(READ + own, read)
    tl.store(SEEN + own, seen)
