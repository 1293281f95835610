"""Block-sparse attention of query blocks over a paged cache; dense attention is the same kernel without far units.

Q [tokens, kv_heads * group, head_dim], rotated; OUT [tokens, kv_heads * group, value_dim]; K, V, BLOCKS, PAGES, FAR,
FAR_COUNT, COLUMNS, NEAR as in `transom_cuda_triton.kernels`; SINKS float32 [kv_heads * group], a logit that brings no
value. Q, K, V and OUT are float16, bfloat16 or float32; sums are float32.

Grid (blocks * tiles, kv_heads), tiles = ceil(64 * group / ROWS): a program has ROWS rows of queries of one block and KV
head. Grouped queries are packed: row r of a block is query r // group, head r % group, so that the rows of a KV head
fill a tensor core's tile and share what is loaded for them.

Far units are put together to tiles of KEYS keys. What the list costs is one load of an index and of a page's number for
each unit; the loop is that of dense attention otherwise. Units of 16 keys are as fine as the tensor cores' K of 16 for
the product with the values lets them be; rows of keys are contiguous, so that gathering by sixteens loads no byte more
than gathering by pages.
"""

from __future__ import annotations

import triton
import triton.language as tl

from transom_cuda_triton.kernels.softmax import (
    NEVER,
    PAGE,
    UNIT,
    attend_at,
    begin,
    gather,
    load_rows,
    logits,
    store_rows,
)


@triton.jit
def attend_blocks(
    Q, K, V, OUT, BLOCKS, PAGES, FAR, FAR_COUNT, COLUMNS, NEAR, SINKS,
    factor, cap, window,
    q_token, k_page, k_head, v_page, v_head, out_token, most_pages, most_far,
    GROUP: tl.constexpr, HEAD: tl.constexpr, HEAD_REST: tl.constexpr, VALUE: tl.constexpr, VALUE_REST: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
    SPARSE: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, WITH_SINKS: tl.constexpr,
):  # fmt: skip
    """See the module. HEAD + HEAD_REST is the head size, both powers of two, or HEAD_REST 0; VALUE likewise."""
    tiles: tl.constexpr = (64 * GROUP + ROWS - 1) // ROWS
    block, tile, head = tl.program_id(0) // tiles, tl.program_id(0) % tiles, tl.program_id(1)
    kv_heads = tl.num_programs(1)
    sequence, first_row = tl.load(BLOCKS + 4 * block), tl.load(BLOCKS + 4 * block + 1)
    first, count = tl.load(BLOCKS + 4 * block + 2), tl.load(BLOCKS + 4 * block + 3)
    if tile * ROWS >= count * GROUP:
        return
    row = tile * ROWS + tl.arange(0, ROWS)
    query, member = row // GROUP, row % GROUP
    real = query < count
    position = first + query
    head_dim: tl.constexpr = HEAD + HEAD_REST
    value_dim: tl.constexpr = VALUE + VALUE_REST
    from_head = head * GROUP + member
    pages = PAGES + sequence * most_pages
    keys, values = K + head.to(tl.int64) * k_head, V + head.to(tl.int64) * v_head

    places = (first_row + query).to(tl.int64) * q_token + from_head * head_dim
    qa, qb = load_rows(Q, places, 1, real, HEAD, HEAD_REST)
    top, total, acca, accb = begin(SINKS, from_head, real, ROWS, VALUE, VALUE_REST, WITH_SINKS)
    slot = tl.arange(0, KEYS)

    if SPARSE:
        far = FAR + (block * kv_heads + head).to(tl.int64) * most_far
        units = tl.load(FAR_COUNT + block * kv_heads + head)
        for start in range(0, units, KEYS // UNIT):
            place = start + slot // UNIT
            chosen = place < units
            at = tl.load(far + place, mask=chosen, other=0) * UNIT + slot % UNIT
            seen = chosen[None, :]
            if WINDOWED:
                seen = seen & (position[:, None] - at[None, :] < window)
            top, total, acca, accb = attend_at(
                qa, qb, keys, values, pages, at, chosen, seen, k_page, v_page, factor, cap, top, total, acca, accb,
                HEAD, HEAD_REST, VALUE, VALUE_REST, CAPPED,
            )  # fmt: skip
        columns = COLUMNS + (block * kv_heads + head) * PAGE
        for start in range(0, PAGE, KEYS):
            at = tl.load(columns + start + slot)
            chosen = at >= 0
            if tl.max(at, 0) >= 0:
                seen = chosen[None, :]
                if WINDOWED:
                    seen = seen & (position[:, None] - at[None, :] < window)
                top, total, acca, accb = attend_at(
                    qa, qb, keys, values, pages, at, chosen, seen, k_page, v_page, factor, cap, top, total, acca, accb,
                    HEAD, HEAD_REST, VALUE, VALUE_REST, CAPPED,
                )  # fmt: skip

    near, end = tl.load(NEAR + block * kv_heads + head), first + count
    if WINDOWED:  # what no query of the block sees is not read
        near = tl.maximum(near, (first - window + 1) // PAGE * PAGE)
    for start in range(near, end, KEYS):
        at = start + slot
        there = at < end
        key = near + (start - near)  # a number of Triton's also where it is interpreted
        page = tl.load(pages + key // PAGE).to(tl.int64)
        ka, kb = load_rows(keys + page * k_page, key % PAGE + slot, head_dim, there, HEAD, HEAD_REST)
        va, vb = load_rows(values + page * v_page, key % PAGE + slot, value_dim, there, VALUE, VALUE_REST)
        s = logits(qa, qb, ka, kb, factor, cap, HEAD_REST, CAPPED)
        distance = position[:, None] - at[None, :]
        seen = (distance >= 0) & there[None, :]
        if WINDOWED:
            seen = seen & (distance < window)
        s = tl.where(seen, s, NEVER)
        top, total, acca, accb = gather(s, va, vb, top, total, acca, accb, VALUE_REST)

    out = (first_row + query).to(tl.int64) * out_token + from_head * value_dim
    store_rows(OUT + out, acca, accb, total, real, VALUE, VALUE_REST)
