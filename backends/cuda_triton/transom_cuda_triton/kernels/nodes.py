"""Computes side nodes: copies of the nodes that contain columns, without those columns.

K, PAGES, SLOTS, CHOOSERS and COVERAGE as in `transom_cuda_triton.kernels.columns`; MEANS, VARIANCES, COUNTS, COLUMNS,
PATCHES and SIDES as in `.routed`. Grid (choosers, kv_heads, 8): a program computes 8 of the 64 side nodes from 64 keys.
Columns are before the local window, so their nodes are complete.
"""

from __future__ import annotations

import triton
import triton.language as tl

from transom_cuda_triton.kernels.append import NODES, keep_nodes
from transom_cuda_triton.kernels.routed import MOST_COLUMNS, NODE
from transom_cuda_triton.kernels.softmax import PAGE, load_rows


@triton.jit
def patch_nodes(
    K, MEANS, VARIANCES, COUNTS, PAGES, SLOTS, CHOOSERS, COVERAGE, COLUMNS, PATCHES, SIDES,
    k_page, k_head, most_pages, most_nodes, cache_pages,
    HEAD: tl.constexpr, HEAD_REST: tl.constexpr,
):  # fmt: skip
    """See the module."""
    chooser, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_heads = tl.num_programs(1)
    head_dim: tl.constexpr = HEAD + HEAD_REST
    sequence = tl.load(CHOOSERS + chooser)
    if (sequence < 0) | (tl.load(COVERAGE + head) < 0.0):
        return
    slot = tl.load(SLOTS + sequence)
    own = slot * kv_heads + head
    key = tl.arange(0, PAGE)
    place = part * NODES + key // NODE
    patch = tl.load(PATCHES + own * MOST_COLUMNS + place)
    if tl.max(patch, 0) < 0:
        return
    tl.store(SIDES + own.to(tl.int64) * most_nodes + patch, place.to(tl.int8), mask=(patch >= 0) & (key % NODE == 0))
    at = patch * NODE + key % NODE
    column = tl.load(COLUMNS + own * MOST_COLUMNS + tl.arange(0, MOST_COLUMNS))
    taken = tl.max((at[:, None] == column[None, :]).to(tl.int32), 1) > 0
    there = (patch >= 0) & (taken == 0)
    page = tl.load(PAGES + sequence * most_pages + at // PAGE, mask=there, other=0).to(tl.int64)
    keys = K + head.to(tl.int64) * k_head
    ka, kb = load_rows(keys, page * k_page + at % PAGE * head_dim, there, HEAD, HEAD_REST, True)
    counts = tl.sum(tl.reshape(there.to(tl.int32), [NODES, NODE]), 1)
    row = ((cache_pages + slot * NODES + part).to(tl.int64) * kv_heads + head) * NODES + tl.arange(0, NODES)
    tl.store(COUNTS + row, counts)
    d = tl.arange(0, HEAD)
    keep_nodes(ka.to(tl.float32), there, counts, row * head_dim, d, d < HEAD, MEANS, VARIANCES, HEAD)
    if HEAD_REST > 0:
        d = tl.arange(0, HEAD_REST)
        inside = d < HEAD_REST
        keep_nodes(kb.to(tl.float32), there, counts, row * head_dim, HEAD + d, inside, MEANS, VARIANCES, HEAD_REST)
