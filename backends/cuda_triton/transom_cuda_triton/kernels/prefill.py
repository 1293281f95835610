"""Block-sparse attention of query blocks over a paged cache; dense attention is the same kernel without far units.

Q [tokens, kv_heads * group, head_dim], rotated; OUT [tokens, kv_heads * group, value_dim]; K, V, BLOCKS, PAGES, FAR,
FAR_COUNT, COLUMNS, NEAR as in `transom_cuda_triton.kernels`; SINKS float32 [kv_heads * group], a logit without a value.
Q, K, V and OUT are float16, bfloat16 or float32; sums are float32.

Grid (blocks * tiles, kv_heads), tiles = ceil(64 * group / ROWS): a program has ROWS rows of queries of one block and KV
head. Grouped queries are packed: row r of a block is query r // group, head r % group, so the rows of a KV head fill a
tensor core's tile and share loads.

Far units are gathered to tiles of KEYS keys. The loop over whole tiles is the loop of dense attention with a different
source of pages. Incomplete tiles and single keys have a loop of their own, and so do the keys on the diagonal, because
before it dense attention compares no positions unless there is a window. Units cannot be smaller than 16 keys, the K of
the tensor cores' product with the values. Rows of keys are contiguous, so gathering units of 16 keys loads no more
bytes than gathering pages.
"""

from __future__ import annotations

import triton
import triton.language as tl

from transom_cuda_triton.kernels.softmax import (
    PAGE,
    UNIT,
    attend_list,
    attend_loose,
    attend_run,
    begin,
    load_rows,
    loose_tiles,
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
    qa, qb = load_rows(Q, places, real, HEAD, HEAD_REST, True)
    top, total, acca, accb = begin(SINKS, from_head, real, ROWS, VALUE, VALUE_REST, WITH_SINKS)

    if SPARSE:
        far = FAR + (block * kv_heads + head).to(tl.int64) * most_far
        units = tl.load(FAR_COUNT + block * kv_heads + head)
        columns = COLUMNS + (block * kv_heads + head) * PAGE
        left = units % (KEYS // UNIT)
        whole = units - left
        rest = far + whole
        loose, behind = loose_tiles(columns, left, KEYS)
        top, total, acca, accb = attend_list(
            qa, qb, keys, values, pages, far, 0, whole, position,
            k_page, v_page, factor, cap, window, top, total, acca, accb,
            HEAD, HEAD_REST, VALUE, VALUE_REST, KEYS, CAPPED, WINDOWED,
        )  # fmt: skip
        top, total, acca, accb = attend_loose(
            qa, qb, keys, values, pages, rest, left, columns, loose, behind, position,
            k_page, v_page, factor, cap, window, top, total, acca, accb,
            HEAD, HEAD_REST, VALUE, VALUE_REST, KEYS, CAPPED, WINDOWED,
        )  # fmt: skip

    near, end = tl.load(NEAR + block * kv_heads + head), first + count
    if WINDOWED:  # keys that no query of the block sees are not read
        near = tl.maximum(near, (first - window + 1) // PAGE * PAGE)
    else:  # keys that every query of the block sees are not masked
        diagonal = near + (first + 1 - near) // KEYS * KEYS
        top, total, acca, accb = attend_run(
            qa, qb, keys, values, pages, near, diagonal, end, position,
            k_page, v_page, factor, cap, window, top, total, acca, accb,
            HEAD, HEAD_REST, VALUE, VALUE_REST, KEYS, CAPPED, WINDOWED, False,
        )  # fmt: skip
        near = diagonal
    top, total, acca, accb = attend_run(
        qa, qb, keys, values, pages, near, end, end, position,
        k_page, v_page, factor, cap, window, top, total, acca, accb,
        HEAD, HEAD_REST, VALUE, VALUE_REST, KEYS, CAPPED, WINDOWED, True,
    )  # fmt: skip

    out = (first_row + query).to(tl.int64) * out_token + from_head * value_dim
    store_rows(OUT + out, acca, accb, total, real, VALUE, VALUE_REST)
