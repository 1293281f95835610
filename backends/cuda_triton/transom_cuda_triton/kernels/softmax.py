"""Online softmax over tiles of keys, shared by the attention kernels. Logits are base 2.

Source: Milakov and Gimelshein 2018 (arXiv:1805.02867); Dao 2023 (arXiv:2307.08691).
"""

from __future__ import annotations

import triton
import triton.language as tl

PAGE = tl.constexpr(64)
UNIT = tl.constexpr(16)
CHUNK = tl.constexpr(16)
"""The columns of a key or value are a multiple of this."""
LOG2E = tl.constexpr(1.4426950408889634)
NEVER = tl.constexpr(-1.0e30)
"""Used in place of minus infinity, whose difference from itself is NaN. Rows that see no key stay near it."""
NOTHING = tl.constexpr(-1.0e20)
"""Above `NEVER` times any scale, and below every possible logit."""


@triton.jit
def load_rows(base, at, seen, columns: tl.constexpr, rest: tl.constexpr, MASKED: tl.constexpr):
    """Load rows [N, columns] and [N, rest] at `base + at`, with zeros where MASKED and not `seen`.

    A head size that is not a power of two is the sum of two of them, 80 = 64 + 16, so nothing is padded. If `rest` is
    0, the second result is unused.
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
    """The factor that converts the result of `logits` to base 2; positive, like `factor`."""
    if CAPPED:
        scale = factor * 0.0 + 1.0
    else:
        scale = factor * LOG2E
    return scale


@triton.jit
def logits(qa, qb, ka, kb, factor, cap, rest: tl.constexpr, CAPPED: tl.constexpr):
    """Logits, float32 [M, N]. Without a cap they are scaled in `gather`, where that needs no extra instruction."""
    s = tl.dot(qa, tl.trans(ka), input_precision="ieee")
    if rest > 0:
        s = tl.dot(qb, tl.trans(kb), s, input_precision="ieee")
    if CAPPED:  # cap * tanh(x / cap), tanh(y) = 2 sigmoid(2 y) - 1
        s = (2.0 * tl.sigmoid(s * (2.0 * factor / cap)) - 1.0) * (cap * LOG2E)
    return s


@triton.jit
def gather(s, scale, va, vb, top, total, acca, accb, rest: tl.constexpr):
    """Add a tile of logits [M, N], `NEVER` where masked, and its values to the sums.

    `s * scale` is base 2, like `top`; the product and the difference are one instruction.
    """
    now = tl.maximum(top, tl.max(s, 1) * scale)
    # A row that has seen no key yet must not subtract its own maximum: exp2(NEVER - NEVER) is 1.
    p = tl.exp2(s * scale - tl.maximum(now, NOTHING)[:, None])
    keep = tl.exp2(top - now)
    total = total * keep + tl.sum(p, 1)
    acca = tl.dot(p.to(va.dtype), va, acca * keep[:, None], input_precision="ieee")
    if rest > 0:
        accb = tl.dot(p.to(vb.dtype), vb, accb * keep[:, None], input_precision="ieee")
    return now, total, acca, accb


@triton.jit
def begin(SINKS, at, real, ROWS: tl.constexpr, VALUE: tl.constexpr, VALUE_REST: tl.constexpr, WITH_SINKS: tl.constexpr):
    """The initial state (largest logit, sum, values, rest of the values), with only the sinks of the heads."""
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
    """Repeat the value of each unit for its keys: [KEYS // UNIT] -> [KEYS]."""
    return tl.reshape(tl.broadcast_to(of_units[:, None], [KEYS // UNIT, UNIT]), [KEYS])


@triton.jit
def attend_list(
    qa, qb, keys, values, pages, far, start, stop, position, k_page, v_page, factor, cap, window,
    top, total, acca, accb,
    HEAD: tl.constexpr, HEAD_REST: tl.constexpr, VALUE: tl.constexpr, VALUE_REST: tl.constexpr, KEYS: tl.constexpr,
    CAPPED: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Add the units `far[start:stop]`, in whole tiles, to the sums; keys outside the window are masked.

    List entries are prefetched two tiles ahead and pages one tile ahead, so no tile waits for an address. Compared with
    dense attention, the loop has two more loads per unit: a list entry and a page. Offsets are in CHUNKs of elements,
    so that 32-bit products are enough: 2^31 CHUNKs exceed any card's memory. `k_page` and `v_page` are multiples of
    CHUNK.
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
        # Triton does not pipeline a loop that passes on a value of the previous iteration unchanged.
        key, page, after = after * UNIT, next_page, next_after
    return top, total, acca, accb


@triton.jit
def loose_tiles(columns, left, KEYS: tl.constexpr):
    """The range (first, last + 1) of the tiles of `attend_loose`: tile 0 is the last `left` units of a list, if there
    are any, and tiles from 1 on are the columns.
    """
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
    """Add incomplete tiles and columns to the sums: tiles `start` to `stop`, numbered as in `loose_tiles`. Tile 0 has
    the units `rest[:left]`.
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
    """Add consecutive tiles of keys from `start` to `stop` to the sums, of a sequence with `end` keys.

    With MASKED, keys from `end` on and keys after a query are masked. `start` is a multiple of KEYS. Pages are
    prefetched.
    """
    scale = exponent(factor, CAPPED)
    slot = tl.arange(0, KEYS)
    rows = slot.to(tl.int64)
    last = (end - 1) // PAGE
    page = tl.load(pages + tl.minimum(start // PAGE, last))
    for step in range(start, stop, KEYS):
        key = start + (step - start)  # a Triton value, in the interpreter too, where `step` is an int of Python
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
    """Divide the values [M, VALUE + VALUE_REST] by their sums, and store them at `base` [M]."""
    share = 1.0 / total
    out = base[:, None] + tl.arange(0, VALUE)[None, :]
    tl.store(out, (acca * share[:, None]).to(base.dtype.element_ty), mask=real[:, None])
    if VALUE_REST > 0:
        out = base[:, None] + (VALUE + tl.arange(0, VALUE_REST))[None, :]
        tl.store(out, (accb * share[:, None]).to(base.dtype.element_ty), mask=real[:, None])
