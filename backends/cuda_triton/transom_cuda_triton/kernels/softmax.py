"""Online softmax over tiles of keys: what the attention kernels share.

Source: Milakov and Gimelshein 2018 (arXiv:1805.02867); Dao 2023 (arXiv:2307.08691). Logits are in powers of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

PAGE = tl.constexpr(64)
UNIT = tl.constexpr(16)
CHUNK = tl.constexpr(16)
"""Every row of keys or values is a whole number of these."""
LOG2E = tl.constexpr(1.4426950408889634)
NEVER = tl.constexpr(-1.0e30)
"""In place of minus infinity, whose difference with itself is no number: rows that see nothing stay near it."""
NOTHING = tl.constexpr(-1.0e20)
"""Between `NEVER` times any scale and every logit there is."""


@triton.jit
def load_rows(base, at, seen, columns: tl.constexpr, rest: tl.constexpr, MASKED: tl.constexpr):
    """Rows [N, columns] and [N, rest] at `base + at`, zero where MASKED and not `seen`; `rest` 0: the second is empty.

    A head size that is no power of two is the sum of two of them, so nothing is padded: 80 = 64 + 16.
    """
    c = tl.arange(0, columns)
    if MASKED:
        first = tl.load(base + at[:, None] + c[None, :], mask=seen[:, None], other=0.0)
    else:
        first = tl.load(base + at[:, None] + c[None, :])
    if rest > 0:
        r = columns + tl.arange(0, rest)
        if MASKED:
            second = tl.load(base + at[:, None] + r[None, :], mask=seen[:, None], other=0.0)
        else:
            second = tl.load(base + at[:, None] + r[None, :])
    else:
        second = first
    return first, second


@triton.jit
def exponent(factor, CAPPED: tl.constexpr):
    """What makes powers of two of what `logits` returns; above 0, as `factor` is."""
    if CAPPED:
        scale = factor * 0.0 + 1.0
    else:
        scale = factor * LOG2E
    return scale


@triton.jit
def logits(qa, qb, ka, kb, factor, cap, rest: tl.constexpr, CAPPED: tl.constexpr):
    """float32 [M, N]. Those without a cap are scaled in `gather`, where it costs no instruction."""
    s = tl.dot(qa, tl.trans(ka), input_precision="ieee")
    if rest > 0:
        s = tl.dot(qb, tl.trans(kb), s, input_precision="ieee")
    if CAPPED:  # cap * tanh(x / cap), tanh(y) = 2 sigmoid(2 y) - 1
        s = (2.0 * tl.sigmoid(s * (2.0 * factor / cap)) - 1.0) * (cap * LOG2E)
    return s


@triton.jit
def gather(s, scale, va, vb, top, total, acca, accb, rest: tl.constexpr):
    """Takes a tile of logits [M, N], `NEVER` where nothing is seen, and its values into the sums.

    `s * scale` is in powers of two, as `top` is; the product and the difference are one instruction.
    """
    now = tl.maximum(top, tl.max(s, 1) * scale)
    # A row that has seen nothing yet must not take its own maximum for a logit: exp2(NEVER - NEVER) is 1.
    p = tl.exp2(s * scale - tl.maximum(now, NOTHING)[:, None])
    keep = tl.exp2(top - now)
    total = total * keep + tl.sum(p, 1)
    acca = tl.dot(p.to(va.dtype), va, acca * keep[:, None], input_precision="ieee")
    if rest > 0:
        accb = tl.dot(p.to(vb.dtype), vb, accb * keep[:, None], input_precision="ieee")
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
def spread(of_units, KEYS: tl.constexpr):
    """[KEYS // UNIT] -> [KEYS]: what holds for a unit, for each of its keys."""
    return tl.reshape(tl.broadcast_to(of_units[:, None], [KEYS // UNIT, UNIT]), [KEYS])


@triton.jit
def attend_list(
    qa, qb, keys, values, pages, far, start, stop, position, k_page, v_page, factor, cap, window,
    top, total, acca, accb,
    HEAD: tl.constexpr, HEAD_REST: tl.constexpr, VALUE: tl.constexpr, VALUE_REST: tl.constexpr, KEYS: tl.constexpr,
    CAPPED: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Takes the units `far[start:stop]`, whole tiles of them, into the sums; what counts of them is up to the window.

    What follows from the list is loaded ahead: pages a tile, entries of the list two tiles. So no tile waits for an
    address, and what the loop has beyond that of dense attention is one load of an entry and of a page for each unit.
    Places are counted in CHUNKs of numbers, of which 2^31 are more than a card holds: so products have 32 bits.
    `k_page` and `v_page` are multiples of CHUNK.
    """
    UNITS: tl.constexpr = KEYS // UNIT
    PER_PAGE: tl.constexpr = PAGE // UNIT
    scale = exponent(factor, CAPPED)
    u = tl.arange(0, UNITS)
    inside = (tl.arange(0, KEYS) % UNIT).to(tl.int64)
    key = tl.load(far + start + u, mask=start + u < stop, other=0).to(tl.uint32) * UNIT
    after = tl.load(far + start + UNITS + u, mask=start + UNITS + u < stop, other=0).to(tl.uint32)
    page = tl.load(pages + key // PAGE)
    k_chunks, v_chunks = k_page // CHUNK, v_page // CHUNK
    for at in range(start, stop, UNITS):
        next_page = tl.load(pages + after // PER_PAGE)
        later = at + 2 * UNITS + u
        next_after = tl.load(far + later, mask=later < stop, other=0).to(tl.uint32)
        row = (key % PAGE).to(tl.int32)
        k_at = page * k_chunks + row * ((HEAD + HEAD_REST) // CHUNK)
        v_at = page * v_chunks + row * ((VALUE + VALUE_REST) // CHUNK)
        k_at, v_at = spread(k_at, KEYS).to(tl.int64) * CHUNK, spread(v_at, KEYS).to(tl.int64) * CHUNK
        ka, kb = load_rows(keys, k_at + inside * (HEAD + HEAD_REST), inside, HEAD, HEAD_REST, False)
        va, vb = load_rows(values, v_at + inside * (VALUE + VALUE_REST), inside, VALUE, VALUE_REST, False)
        s = logits(qa, qb, ka, kb, factor, cap, HEAD_REST, CAPPED)
        if WINDOWED:
            s = tl.where(position[:, None] - (spread(key.to(tl.int32), KEYS) + inside)[None, :] < window, s, NEVER)
        top, total, acca, accb = gather(s, scale, va, vb, top, total, acca, accb, VALUE_REST)
        # Triton pipelines no loop that hands on a value of the iteration before as it is.
        key, page, after = after * UNIT, next_page, next_after
    return top, total, acca, accb


@triton.jit
def loose_tiles(columns, left, KEYS: tl.constexpr):
    """What fills no tile: tile 0 are the `left` last units of a list, tiles 1 and on the columns. (first, last + 1)."""
    index = tl.arange(0, PAGE)
    listed = tl.max(tl.where(tl.load(columns + index) >= 0, index + 1, 0), 0)
    return 1 - tl.minimum(left, 1), 1 + (listed + KEYS - 1) // KEYS


@triton.jit
def attend_loose(
    qa, qb, keys, values, pages, rest, left, columns, start, stop, position, k_page, v_page, factor, cap, window,
    top, total, acca, accb,
    HEAD: tl.constexpr, HEAD_REST: tl.constexpr, VALUE: tl.constexpr, VALUE_REST: tl.constexpr, KEYS: tl.constexpr,
    CAPPED: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Takes what fills no tile into the sums, tiles `start` to `stop` of those that `loose_tiles` tells:
    tile 0 are the units `rest[:left]`.
    """
    scale = exponent(factor, CAPPED)
    slot = tl.arange(0, KEYS)
    place = slot // UNIT
    for tile in range(start, stop):
        in_list = tile + slot * 0 == 0
        unit = tl.load(rest + place, mask=in_list & (place < left), other=-1)
        column = tl.load(columns + (tile - 1) * KEYS + slot, mask=~in_list, other=-1)
        at = tl.where(unit >= 0, unit * UNIT + slot % UNIT, column)
        there = at >= 0
        page = tl.load(pages + at // PAGE, mask=there, other=0).to(tl.int64)
        k_at = page * k_page + at % PAGE * (HEAD + HEAD_REST)
        v_at = page * v_page + at % PAGE * (VALUE + VALUE_REST)
        ka, kb = load_rows(keys, k_at, there, HEAD, HEAD_REST, True)
        va, vb = load_rows(values, v_at, there, VALUE, VALUE_REST, True)
        s = logits(qa, qb, ka, kb, factor, cap, HEAD_REST, CAPPED)
        seen = there[None, :]
        if WINDOWED:
            seen = seen & (position[:, None] - at[None, :] < window)
        s = tl.where(seen, s, NEVER)
        top, total, acca, accb = gather(s, scale, va, vb, top, total, acca, accb, VALUE_REST)
    return top, total, acca, accb


@triton.jit
def attend_run(
    qa, qb, keys, values, pages, start, stop, end, position, k_page, v_page, factor, cap, window,
    top, total, acca, accb,
    HEAD: tl.constexpr, HEAD_REST: tl.constexpr, VALUE: tl.constexpr, VALUE_REST: tl.constexpr, KEYS: tl.constexpr,
    CAPPED: tl.constexpr, WINDOWED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Takes the tiles of keys from `start` up to `stop` into the sums, of a sequence with `end` keys: all of them, or
    where MASKED those that are there and not behind a query. `start` is a multiple of KEYS; pages are loaded ahead.
    """
    scale = exponent(factor, CAPPED)
    slot = tl.arange(0, KEYS)
    rows = slot.to(tl.int64)
    last = (end - 1) // PAGE
    page = tl.load(pages + tl.minimum(start // PAGE, last))
    for step in range(start, stop, KEYS):
        key = start + (step - start)  # a number of Triton's also where it is interpreted
        at = key + slot
        next_page = tl.load(pages + tl.minimum((key + KEYS) // PAGE, last))
        row = key % PAGE
        from_k = keys + (page.to(tl.int64) * k_page + row * (HEAD + HEAD_REST))
        from_v = values + (page.to(tl.int64) * v_page + row * (VALUE + VALUE_REST))
        ka, kb = load_rows(from_k, rows * (HEAD + HEAD_REST), at < end, HEAD, HEAD_REST, MASKED)
        va, vb = load_rows(from_v, rows * (VALUE + VALUE_REST), at < end, VALUE, VALUE_REST, MASKED)
        s = logits(qa, qb, ka, kb, factor, cap, HEAD_REST, CAPPED)
        if MASKED:
            distance = position[:, None] - at[None, :]
            seen = distance >= 0
            if WINDOWED:
                seen = seen & (distance < window)
            s = tl.where(seen, s, NEVER)
        top, total, acca, accb = gather(s, scale, va, vb, top, total, acca, accb, VALUE_REST)
        page = next_page
    return top, total, acca, accb


@triton.jit
def store_rows(base, acca, accb, total, real, VALUE: tl.constexpr, VALUE_REST: tl.constexpr):
    """The values [M, VALUE + VALUE_REST] over their sums, to `base` [M]."""
    share = 1.0 / total
    out = base[:, None] + tl.arange(0, VALUE)[None, :]
    tl.store(out, (acca * share[:, None]).to(base.dtype.element_ty), mask=real[:, None])
    if VALUE_REST > 0:
        out = base[:, None] + (VALUE + tl.arange(0, VALUE_REST))[None, :]
        tl.store(out, (accb * share[:, None]).to(base.dtype.element_ty), mask=real[:, None])
