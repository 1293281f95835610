"""Node routing: what its kernels share. The choice is defined by the NumPy reference, `transom.ops.sparse_routing`.

**Nodes.** Of every 8 keys MEANS and VARIANCES [rows, head_dim], of the cache's form, and COUNTS int32 [rows], at the
row (page * kv_heads + head) * 8 + node. Those of the cache's pages are of all keys, whoever reads them. Behind them lie
8 * slots pages more, of nodes alone: a sequence that is read sparsely has a slot, and there, in the pages
cache_pages + 8 * slot and on, up to 64 side nodes for each KV head: nodes that hold columns a second time, without
them.

**What a layer keeps of a slot.** COLUMNS int32 [slots, kv_heads, 64], the positions of the columns, ascending, -1
behind them; PATCHES int32 [slots, kv_heads, 64], the numbers of the nodes that hold them (position / 8), ascending, -1
behind them; SIDES int8 [slots, kv_heads, most_nodes], for each node its place in PATCHES or -1, so that to look a node
up costs a byte and not 64 comparisons; RING [slots, 16, kv_heads * group, head_dim], rotated queries at positions p
with p % 4 = 3, each at the place p / 4 % 16. All of COLUMNS, PATCHES and SIDES are -1 at first; whoever takes a slot
over leaves them as they are, since a sequence chooses its columns before it looks at them, and that clears what was
there.

**What a step brings.** BLOCKS, PAGES as in `transom_cuda_triton.kernels`; a block without queries stands for nothing.
SLOTS int32 [sequences], -1 for a sequence that reads everything. COVERAGE float32 [kv_heads], -1 for a head that reads
everything. FLAG int32 [1] is set to 1, and never to 0, where scores are not finite.

Logits are in powers of two. What a sum takes in depends on where a key lies and never on a number's value: what is not
finite stays so, and is found in the totals.
"""

from __future__ import annotations

import triton
import triton.language as tl

from transom_cuda_triton.kernels.softmax import LOG2E, NEVER, PAGE, load_rows

NODE = tl.constexpr(8)
NODES = tl.constexpr(64)
"""In a tile."""
MOST_COLUMNS = tl.constexpr(64)
VARIANCE_WEIGHT = tl.constexpr(0.7)
VARIANCE_CAP = tl.constexpr(8.3)


@triton.jit
def first_seen(position, window, WINDOWED: tl.constexpr):
    """The first position that a query sees."""
    start = position * 0
    if WINDOWED:
        start = tl.maximum(position - window + 1, 0)
    return start


@triton.jit
def far_end(position, local):
    """Where the local window of a position's block begins."""
    return tl.maximum(position // PAGE - local, 0) * PAGE


@triton.jit
def extent(
    BLOCKS, SLOTS, COVERAGE, block, head, window, local, dense_below, WINDOWED: tl.constexpr
):  # fmt: skip
    """(sequence, slot, first row, first position, queries, first position seen, end of what is chosen from) of a block.

    The last is 0 where the block reads everything.
    """
    sequence, row = tl.load(BLOCKS + 4 * block), tl.load(BLOCKS + 4 * block + 1)
    first, count = tl.load(BLOCKS + 4 * block + 2), tl.load(BLOCKS + 4 * block + 3)
    slot = tl.load(SLOTS + sequence)
    start, far = first_seen(first, window, WINDOWED), far_end(first, local)
    sparse = (count > 0) & (first + count > dense_below) & (far > start) & (slot >= 0)
    sparse = sparse & (tl.load(COVERAGE + head) >= 0.0)
    return sequence, slot, row, first, count, start, tl.where(sparse, far, 0)


@triton.jit
def looked_at(count, stride):
    """How many of a block's queries are looked at."""
    return tl.maximum(count // stride, 1)


@triton.jit
def powers(s, cap, CAPPED: tl.constexpr):
    """Logits, capped, in powers of two."""
    if CAPPED:  # cap * tanh(x / cap), tanh(y) = 2 sigmoid(2 y) - 1
        s = (2.0 * tl.sigmoid(s * (2.0 / cap)) - 1.0) * (cap * LOG2E)
    else:
        s = s * LOG2E
    return s


@triton.jit
def products(qa, qb, ka, kb, rest: tl.constexpr):
    """float32 [M, N]; of float32 all its digits count, unlike in attention: a choice hangs on them."""
    s = tl.dot(qa, tl.trans(ka), input_precision="ieee")
    if rest > 0:
        s = tl.dot(qb, tl.trans(kb), s, input_precision="ieee")
    return s


@triton.jit
def key_logits(
    qa, qb, keys, pages, at, there, k_page, factor, cap,
    HEAD: tl.constexpr, HEAD_REST: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """[M, N] of the keys at any positions `at` of a sequence, as far as they are `there`."""
    page = tl.load(pages + at // PAGE, mask=there, other=0).to(tl.int64)
    ka, kb = load_rows(keys, page * k_page + at % PAGE * (HEAD + HEAD_REST), there, HEAD, HEAD_REST, True)
    return powers(products(qa, qb, ka, kb, HEAD_REST) * factor, cap, CAPPED)


@triton.jit
def weights(s, norm, seen):
    """[M, N], 0 where not seen."""
    return tl.exp2(tl.where(seen, s - norm[:, None], NEVER))


@triton.jit
def rescale(top, s, seen):
    """(largest logit [M], what sums so far are multiplied by, weights [M, N]) with a tile of logits taken in."""
    now = tl.maximum(top, tl.max(tl.where(seen, s, NEVER), 1))
    return now, tl.exp2(top - now), weights(s, now, seen)
