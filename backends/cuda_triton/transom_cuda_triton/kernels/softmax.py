"""Online softmax over tiles of keys: what the attention kernels share.

Source: Milakov and Gimelshein 2018 (arXiv:1805.02867); Dao 2023 (arXiv:2307.08691). Logits are in powers of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

PAGE = tl.constexpr(64)
UNIT = tl.constexpr(16)
LOG2E = tl.constexpr(1.4426950408889634)
NEVER = tl.constexpr(-1.0e30)
"""In place of minus infinity, whose difference with itself is no number: rows that see nothing stay at it."""


@triton.jit
def load_rows(base, at, stride, seen, columns: tl.constexpr, rest: tl.constexpr):
    """Rows [N, columns] and [N, rest] at `base + at * stride`, zero where not `seen`; `rest` 0: the second is empty.

    A head size that is no power of two is the sum of two of them, so nothing is padded: 80 = 64 + 16.
    """
    c = tl.arange(0, columns)
    first = tl.load(base + at[:, None] * stride + c[None, :], mask=seen[:, None], other=0.0)
    if rest > 0:
        r = columns + tl.arange(0, rest)
        second = tl.load(base + at[:, None] * stride + r[None, :], mask=seen[:, None], other=0.0)
    else:
        second = first
    return first, second


@triton.jit
def logits(qa, qb, ka, kb, factor, cap, rest: tl.constexpr, CAPPED: tl.constexpr):
    """float32 [M, N], times log2 e."""
    s = tl.dot(qa, tl.trans(ka))
    if rest > 0:
        s = tl.dot(qb, tl.trans(kb), s)
    if CAPPED:  # cap * tanh(x / cap), tanh(y) = 2 sigmoid(2 y) - 1
        s = (2.0 * tl.sigmoid(s * (2.0 * factor / cap)) - 1.0) * (cap * LOG2E)
    else:
        s = s * (factor * LOG2E)
    return s


@triton.jit
def gather(s, va, vb, top, total, acca, accb, rest: tl.constexpr):
    """Takes a tile of logits [M, N], `NEVER` where nothing is seen, and its values into the sums."""
    now = tl.maximum(top, tl.max(s, 1))
    p = tl.where(s > 0.5 * NEVER, tl.exp2(s - now[:, None]), 0.0)
    keep = tl.exp2(top - now)
    total = total * keep + tl.sum(p, 1)
    acca = tl.dot(p.to(va.dtype), va, acca * keep[:, None])
    if rest > 0:
        accb = tl.dot(p.to(vb.dtype), vb, accb * keep[:, None])
    return now, total, acca, accb


@triton.jit
def begin(SINKS, at, real, ROWS: tl.constexpr, VALUE: tl.constexpr, VALUE_REST: tl.constexpr, WITH_SINKS: tl.constexpr):
    """(largest logit, sum, values, rest of the values) of rows that have seen nothing but the sinks of their heads."""
    if WITH_SINKS:
        top = tl.load(SINKS + at, mask=real, other=0.0) * LOG2E
        total = tl.full([ROWS], 1.0, tl.float32)
    else:
        top = tl.full([ROWS], NEVER, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
    acca = tl.zeros([ROWS, VALUE], tl.float32)
    if VALUE_REST > 0:
        accb = tl.zeros([ROWS, VALUE_REST], tl.float32)
    else:
        accb = acca
    return top, total, acca, accb


@triton.jit
def attend_at(
    qa, qb, keys, values, pages, at, there, seen, k_page, v_page, factor, cap, top, total, acca, accb,
    HEAD: tl.constexpr, HEAD_REST: tl.constexpr, VALUE: tl.constexpr, VALUE_REST: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Takes the keys at any positions of a sequence into the sums: `there` [N] are loaded, `seen` [M or 1, N] count."""
    page = tl.load(pages + at // PAGE, mask=there, other=0).to(tl.int64)
    ka, kb = load_rows(keys, page * k_page + at % PAGE * (HEAD + HEAD_REST), 1, there, HEAD, HEAD_REST)
    va, vb = load_rows(values, page * v_page + at % PAGE * (VALUE + VALUE_REST), 1, there, VALUE, VALUE_REST)
    s = tl.where(seen, logits(qa, qb, ka, kb, factor, cap, HEAD_REST, CAPPED), NEVER)
    return gather(s, va, vb, top, total, acca, accb, VALUE_REST)


@triton.jit
def store_rows(base, acca, accb, total, real, VALUE: tl.constexpr, VALUE_REST: tl.constexpr):
    """The values [M, VALUE + VALUE_REST] over their sums, to `base` [M]."""
    share = 1.0 / total
    out = base[:, None] + tl.arange(0, VALUE)[None, :]
    tl.store(out, (acca * share[:, None]).to(base.dtype.element_ty), mask=real[:, None])
    if VALUE_REST > 0:
        out = base[:, None] + (VALUE + tl.arange(0, VALUE_REST))[None, :]
        tl.store(out, (accb * share[:, None]).to(base.dtype.element_ty), mask=real[:, None])
