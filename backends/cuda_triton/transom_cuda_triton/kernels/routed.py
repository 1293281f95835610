"""Shared parts of the routing kernels. The NumPy reference `transom.ops.sparse_routing` defines the selection of keys.

**Nodes.** A node summarizes 8 consecutive keys: MEANS and VARIANCES [rows, head_dim], of the cache's type, and COUNTS
int32 [rows], at row (page * kv_heads + head) * 8 + node. The nodes of the cache's pages contain all keys. Behind them
are 8 * slots further pages, for side nodes alone. A sequence with sparse attention has a slot; the pages
cache_pages + 8 * slot to cache_pages + 8 * slot + 7 have its side nodes, up to 64 for each KV head. A side node is a
copy of a node that contains columns, without those columns.

**State of a slot, in each layer.**

- COLUMNS int32 [slots, kv_heads, 64]: positions of the columns, ascending; unused entries at the end are -1.
- PATCHES int32 [slots, kv_heads, 64]: indices (position / 8) of the nodes that contain columns, ascending; unused
  entries at the end are -1.
- SIDES int8 [slots, kv_heads, most_nodes]: for each node its place in PATCHES, or -1. Looking up a node then reads one
  byte, and needs no 64 comparisons.
- RING [slots, 16, kv_heads * group, head_dim]: rotated queries at positions p with p % 4 = 3, each at place p / 4 % 16.

COLUMNS, PATCHES and SIDES are initially -1. A sequence that takes over a slot need not clear them: it selects its
columns before it reads them, and the selection clears the previous ones.

**Inputs of a step.** BLOCKS and PAGES as in `transom_cuda_triton.kernels`; a block without queries is padding. SLOTS
int32 [sequences], -1 for a sequence with dense attention. COVERAGE float32 [kv_heads], -1 for a dense head. FLAG int32
[1] is set to 1 if scores are not finite; the kernels never reset it.

Logits are base 2. Masks depend on positions alone, never on values, so numbers that are not finite reach the totals,
where they are detected.
"""

from __future__ import annotations

import triton
import triton.language as tl

from transom_cuda_triton.kernels.softmax import LOG2E, NEVER, PAGE, load_rows

NODE = tl.constexpr(8)
NODES = tl.constexpr(64)
"""Nodes per tile."""
MOST_COLUMNS = tl.constexpr(64)
VARIANCE_WEIGHT = tl.constexpr(0.7)
VARIANCE_CAP = tl.constexpr(8.3)


@triton.jit
def first_seen(position, window, WINDOWED: tl.constexpr):
    """The first position visible to a query."""
    start = position * 0
    if WINDOWED:
        start = tl.maximum(position - window + 1, 0)
    return start


@triton.jit
def far_end(position, local):
    """The start of the local window of a position's block."""
    return tl.maximum(position // PAGE - local, 0) * PAGE


@triton.jit
def extent(
    BLOCKS, SLOTS, COVERAGE, block, head, window, local, dense_below, WINDOWED: tl.constexpr
):  # fmt: skip
    """(sequence, slot, first row, first position, queries, first visible position, end of the far keys) of a block.

    The last is 0 if the block reads everything.
    """
    sequence, row = tl.load(BLOCKS + 4 * block), tl.load(BLOCKS + 4 * block + 1)
    first, count = tl.load(BLOCKS + 4 * block + 2), tl.load(BLOCKS + 4 * block + 3)
    slot = tl.load(SLOTS + sequence)
    start, far = first_seen(first, window, WINDOWED), far_end(first, local)
    sparse = (count > 0) & (first + count > dense_below) & (far > start) & (slot >= 0)
    sparse = sparse & (tl.load(COVERAGE + head) >= 0.0)
    return sequence, slot, row, first, count, start, tl.where(sparse, far, 0)


@triton.jit
def sampled_queries(count, stride):
    """Number of sampled queries in a block."""
    return tl.maximum(count // stride, 1)


@triton.jit
def powers(s, cap, CAPPED: tl.constexpr):
    """Logits with soft cap, base 2."""
    if CAPPED:  # cap * tanh(x / cap), tanh(y) = 2 sigmoid(2 y) - 1
        s = (2.0 * tl.sigmoid(s * (2.0 / cap)) - 1.0) * (cap * LOG2E)
    else:
        s = s * LOG2E
    return s


@triton.jit
def products(qa, qb, ka, kb, rest: tl.constexpr):
    """q · kᵀ, float32 [M, N], in IEEE precision because the selection of keys depends on small differences."""
    s = tl.dot(qa, tl.trans(ka), input_precision="ieee")
    if rest > 0:
        s = tl.dot(qb, tl.trans(kb), s, input_precision="ieee")
    return s


@triton.jit
def key_logits(
    qa, qb, keys, pages, at, there, k_page, factor, cap,
    HEAD: tl.constexpr, HEAD_REST: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Logits [M, N] of the keys at positions `at` [N] of a sequence; those that are not `there` count as zeros."""
    page = tl.load(pages + at // PAGE, mask=there, other=0).to(tl.int64)
    ka, kb = load_rows(keys, page * k_page + at % PAGE * (HEAD + HEAD_REST), there, HEAD, HEAD_REST, True)
    return powers(products(qa, qb, ka, kb, HEAD_REST) * factor, cap, CAPPED)


@triton.jit
def weights(s, norm, seen):
    """2 ** (s - norm), [M, N], and 0 where not `seen`."""
    return tl.exp2(tl.where(seen, s - norm[:, None], NEVER))


@triton.jit
def rescale(top, s, seen):
    """(largest logit [M], factor of previous sums [M], weights [M, N]) after adding a tile of logits."""
    now = tl.maximum(top, tl.max(tl.where(seen, s, NEVER), 1))
    return now, tl.exp2(top - now), weights(s, now, seen)
