"""Block-sparse attention of single queries over a paged cache: the keys are split among programs, then merged.

Q [tokens, kv_heads * group, head_dim], rotated; OUT [tokens, kv_heads * group, value_dim]; K, V, BLOCKS, PAGES, FAR,
FAR_COUNT, COLUMNS, NEAR, SINKS as in `transom_cuda_triton.kernels.prefill`, with one query per block. `attend_splits`
passes to `merge_splits` the partial outputs, PARTS float32 [blocks, kv_heads, splits, ROWS, value_dim], and SHARES
float32 [blocks, kv_heads, splits, 2, ROWS]: the largest logit of each split, base 2, and its sum.

Grids (blocks, kv_heads, splits) and (blocks, kv_heads). ROWS is `group` rounded up to the rows of a tensor core, 16 or
more, so the heads of a group share loads. The tiles of far units, columns and near keys, in this order, are divided
evenly among the splits; a split without tiles has a largest logit of `NEVER`, which gives it weight 0.

Source: flash decoding, Dao and others 2023 (https://crfm.stanford.edu/2023/10/12/flashdecoding.html).
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
def attend_splits(
    Q, K, V, PARTS, SHARES, BLOCKS, PAGES, FAR, FAR_COUNT, COLUMNS, NEAR,
    factor, cap, window,
    q_token, k_page, k_head, v_page, v_head, most_pages, most_far,
    GROUP: tl.constexpr, HEAD: tl.constexpr, HEAD_REST: tl.constexpr, VALUE: tl.constexpr, VALUE_REST: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SPARSE: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """See the module. HEAD + HEAD_REST is the head size, both powers of two, or HEAD_REST 0; VALUE likewise."""
    block, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_heads, splits = tl.num_programs(1), tl.num_programs(2)
    head_dim: tl.constexpr = HEAD + HEAD_REST
    value_dim: tl.constexpr = VALUE + VALUE_REST
    sequence, row = tl.load(BLOCKS + 4 * block), tl.load(BLOCKS + 4 * block + 1)
    position = tl.load(BLOCKS + 4 * block + 2)
    pages = PAGES + sequence * most_pages
    keys, values = K + head.to(tl.int64) * k_head, V + head.to(tl.int64) * v_head
    member = tl.arange(0, ROWS)
    real = member < GROUP
    at_q = row.to(tl.int64) * q_token + (head * GROUP + member) * head_dim
    qa, qb = load_rows(Q, at_q, real, HEAD, HEAD_REST, True)
    top, total, acca, accb = begin(Q, member, real, ROWS, VALUE, VALUE_REST, False)
    positions = position + 0 * member

    near = tl.load(NEAR + block * kv_heads + head)
    if WINDOWED:
        near = tl.maximum(near, (position - window + 1) // PAGE * PAGE)
    before = 0
    if SPARSE:
        far = FAR + (block * kv_heads + head).to(tl.int64) * most_far
        columns = COLUMNS + (block * kv_heads + head) * PAGE
        units = tl.load(FAR_COUNT + block * kv_heads + head)
        in_list, left = units // (KEYS // UNIT), units % (KEYS // UNIT)
        rest = far + (units - left)
        loose, behind = loose_tiles(columns, left, KEYS)
        before = in_list + behind - loose
    whole = before + (position + 1 - near) // KEYS
    tiles = before + (position - near) // KEYS + 1
    start, stop = tiles * split // splits, tiles * (split + 1) // splits
    if SPARSE:
        top, total, acca, accb = attend_list(
            qa, qb, keys, values, pages, far,
            tl.minimum(start, in_list) * (KEYS // UNIT), tl.minimum(stop, in_list) * (KEYS // UNIT), positions,
            k_page, v_page, factor, cap, window, top, total, acca, accb,
            HEAD, HEAD_REST, VALUE, VALUE_REST, KEYS, CAPPED, WINDOWED,
        )  # fmt: skip
        top, total, acca, accb = attend_loose(
            qa, qb, keys, values, pages, rest, left, columns,
            loose + tl.maximum(start - in_list, 0), loose + tl.minimum(stop, before) - in_list, positions,
            k_page, v_page, factor, cap, window, top, total, acca, accb,
            HEAD, HEAD_REST, VALUE, VALUE_REST, KEYS, CAPPED, WINDOWED,
        )  # fmt: skip
    masked = tl.maximum(start, before)
    if not WINDOWED:
        masked = tl.maximum(start, whole)
        top, total, acca, accb = attend_run(
            qa, qb, keys, values, pages,
            near + (tl.maximum(start, before) - before) * KEYS, near + (tl.minimum(stop, whole) - before) * KEYS,
            position + 1, positions, k_page, v_page, factor, cap, window, top, total, acca, accb,
            HEAD, HEAD_REST, VALUE, VALUE_REST, KEYS, CAPPED, WINDOWED, False,
        )  # fmt: skip
    top, total, acca, accb = attend_run(
        qa, qb, keys, values, pages,
        near + (masked - before) * KEYS, near + (stop - before) * KEYS, position + 1, positions,
        k_page, v_page, factor, cap, window, top, total, acca, accb,
        HEAD, HEAD_REST, VALUE, VALUE_REST, KEYS, CAPPED, WINDOWED, True,
    )  # fmt: skip

    part = ((block * kv_heads + head) * splits + split).to(tl.int64)
    tl.store(SHARES + part * (2 * ROWS) + member, top)
    tl.store(SHARES + part * (2 * ROWS) + ROWS + member, total)
    out = PARTS + (part * ROWS + member[:, None]) * value_dim
    tl.store(out + tl.arange(0, VALUE)[None, :], acca)
    if VALUE_REST > 0:
        tl.store(out + (VALUE + tl.arange(0, VALUE_REST))[None, :], accb)


@triton.jit
def merge_splits(
    PARTS, SHARES, OUT, BLOCKS, SINKS, out_token, splits,
    GROUP: tl.constexpr, VALUE: tl.constexpr, VALUE_REST: tl.constexpr, ROWS: tl.constexpr, WITH_SINKS: tl.constexpr,
):  # fmt: skip
    """See the module."""
    block, head = tl.program_id(0), tl.program_id(1)
    kv_heads = tl.num_programs(1)
    value_dim: tl.constexpr = VALUE + VALUE_REST
    member = tl.arange(0, ROWS)
    real = member < GROUP
    first = (block * kv_heads + head).to(tl.int64) * splits
    top, total, acca, accb = begin(SINKS, head * GROUP + member, real, ROWS, VALUE, VALUE_REST, WITH_SINKS)
    for split in range(splits):
        part = first + split
        theirs = tl.load(SHARES + part * (2 * ROWS) + member)
        weight = tl.load(SHARES + part * (2 * ROWS) + ROWS + member)
        now = tl.maximum(top, theirs)
        mine, other = tl.exp2(top - now), tl.exp2(theirs - now)
        total = total * mine + weight * other
        from_part = PARTS + (part * ROWS + member[:, None]) * value_dim
        acca = acca * mine[:, None] + tl.load(from_part + tl.arange(0, VALUE)[None, :]) * other[:, None]
        if VALUE_REST > 0:
            rest = tl.load(from_part + (VALUE + tl.arange(0, VALUE_REST))[None, :])
            accb = accb * mine[:, None] + rest * other[:, None]
        top = now
    row = tl.load(BLOCKS + 4 * block + 1).to(tl.int64)
    out = row * out_token + (head * GROUP + member) * value_dim
    store_rows(OUT + out, acca, accb, total, real, VALUE, VALUE_REST)
