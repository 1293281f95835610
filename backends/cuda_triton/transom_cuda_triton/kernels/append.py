"""Appends new keys and values to the pages of the cache: rotates the keys, and updates the routing nodes.

NEW_K [tokens, kv_heads, head_dim], not rotated; NEW_V [tokens, kv_heads, value_dim]; COS and SIN float32
[positions, rotated / 2]; K, V, BLOCKS and PAGES as in `transom_cuda_triton.kernels`, except that a block here is the
tokens that go to one page. MEANS and VARIANCES [pages, kv_heads, 8, head_dim] are those of the stored keys of every 8
positions; COUNTS int32 [pages, kv_heads, 8] is the number of keys in each node.

Grid (blocks, kv_heads). A program rotates the new keys of its page, rounds them to the cache's type, and computes the
nodes of the whole page. To do so it rereads the older keys of the page: up to 64 rows per token while decoding, and
none for a prompt that fills whole pages.

Sources: rotary embedding, Su and others 2021 (arXiv:2104.09864), as in ONNX `RotaryEmbedding`; nodes,
`transom.ops.sparse_routing`.
"""

from __future__ import annotations

import triton
import triton.language as tl

PAGE = tl.constexpr(64)
NODE = tl.constexpr(8)
NODES = tl.constexpr(8)
"""Nodes per page."""


@triton.jit
def keep_nodes(keys, there, counts, at, columns, inside, MEANS, VARIANCES, WIDTH: tl.constexpr):
    """Store means and variances of the keys [64, WIDTH] of eight nodes at `at` [8] + column.

    Only keys that are `there` count: `counts` int32 [8] for each node. A node without keys gets zeros.
    """
    x = tl.where(there[:, None], keys, 0.0)
    share = 1.0 / tl.maximum(counts, 1).to(tl.float32)[:, None]
    mean = tl.sum(tl.reshape(x, [NODES, NODE, WIDTH]), 1) * share
    square = tl.sum(tl.reshape(x * x, [NODES, NODE, WIDTH]), 1) * share
    place = at[:, None] + columns[None, :]
    tl.store(MEANS + place, mean.to(MEANS.dtype.element_ty), mask=inside[None, :])
    variance = tl.maximum(square - mean * mean, 0.0)
    tl.store(VARIANCES + place, variance.to(VARIANCES.dtype.element_ty), mask=inside[None, :])


@triton.jit
def append(
    NEW_K, NEW_V, COS, SIN, K, V, MEANS, VARIANCES, COUNTS, BLOCKS, PAGES,
    k_token, v_token, k_page, k_head, v_page, v_head, most_pages,
    HEAD: tl.constexpr, VALUE: tl.constexpr, ROTATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    HALF_WIDTH: tl.constexpr, REST_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    """See the module. The widths are powers of two, at least ROTATED / 2, HEAD - ROTATED (or 0) and VALUE."""
    block, head = tl.program_id(0), tl.program_id(1)
    kv_heads = tl.num_programs(1)
    half: tl.constexpr = ROTATED // 2
    sequence, first_row = tl.load(BLOCKS + 4 * block), tl.load(BLOCKS + 4 * block + 1)
    first, count = tl.load(BLOCKS + 4 * block + 2), tl.load(BLOCKS + 4 * block + 3)
    page = tl.load(PAGES + sequence * most_pages + first // PAGE).to(tl.int64)
    slot = tl.arange(0, PAGE)
    position = first // PAGE * PAGE + slot
    new, there = (position >= first) & (position < first + count), position < first + count
    old = position < first
    row = (first_row + position - first).to(tl.int64)
    keys = K + page * k_page + head.to(tl.int64) * k_head
    fresh = NEW_K + row[:, None] * k_token + head * HEAD
    counts = tl.sum(tl.reshape(there.to(tl.int32), [NODES, NODE]), 1)
    node = tl.arange(0, NODES)
    own = (page * kv_heads + head) * NODES + node
    at = own * HEAD
    tl.store(COUNTS + own, counts)

    h = tl.arange(0, HALF_WIDTH)
    inside = h < half
    a_at, b_at = (2 * h, 2 * h + 1) if INTERLEAVED else (h, half + h)
    taken = new[:, None] & inside[None, :]
    a = tl.load(fresh + a_at[None, :], mask=taken, other=0.0).to(tl.float32)
    b = tl.load(fresh + b_at[None, :], mask=taken, other=0.0).to(tl.float32)
    angle = position[:, None] * half + h[None, :]
    c, s = tl.load(COS + angle, mask=taken, other=0.0), tl.load(SIN + angle, mask=taken, other=0.0)
    turned_a, turned_b = (a * c - b * s).to(K.dtype.element_ty), (b * c + a * s).to(K.dtype.element_ty)
    places = slot[:, None] * HEAD
    tl.store(keys + places + a_at[None, :], turned_a, mask=taken)
    tl.store(keys + places + b_at[None, :], turned_b, mask=taken)
    known = old[:, None] & inside[None, :]
    old_a = tl.load(keys + places + a_at[None, :], mask=known, other=0.0)
    old_b = tl.load(keys + places + b_at[None, :], mask=known, other=0.0)
    all_a = tl.where(new[:, None], turned_a.to(tl.float32), old_a.to(tl.float32))
    all_b = tl.where(new[:, None], turned_b.to(tl.float32), old_b.to(tl.float32))
    keep_nodes(all_a, there, counts, at, a_at, inside, MEANS, VARIANCES, HALF_WIDTH)
    keep_nodes(all_b, there, counts, at, b_at, inside, MEANS, VARIANCES, HALF_WIDTH)

    if REST_WIDTH > 0:
        r = tl.arange(0, REST_WIDTH)
        inside = r < HEAD - ROTATED
        r_at = ROTATED + r
        taken = new[:, None] & inside[None, :]
        x = tl.load(fresh + r_at[None, :], mask=taken, other=0.0).to(K.dtype.element_ty)
        tl.store(keys + places + r_at[None, :], x, mask=taken)
        known = old[:, None] & inside[None, :]
        old_x = tl.load(keys + places + r_at[None, :], mask=known, other=0.0)
        all_x = tl.where(new[:, None], x.to(tl.float32), old_x.to(tl.float32))
        keep_nodes(all_x, there, counts, at, r_at, inside, MEANS, VARIANCES, REST_WIDTH)

    v = tl.arange(0, VALUE_WIDTH)
    taken = new[:, None] & (v < VALUE)[None, :]
    values = tl.load(NEW_V + row[:, None] * v_token + head * VALUE + v[None, :], mask=taken, other=0.0)
    to = V + page * v_page + head.to(tl.int64) * v_head + slot[:, None] * VALUE + v[None, :]
    tl.store(to, values.to(V.dtype.element_ty), mask=taken)
