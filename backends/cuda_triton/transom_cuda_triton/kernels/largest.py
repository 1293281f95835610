"""Selects the largest of many numbers without sorting, until a count or a sum is reached.

The numbers are float32, finite and not negative, so they have the same order as their bits as integers. The smallest
selected number is found by bisection over the bits, with one pass over the numbers per step. The search ends once a
single number is between the bounds; only numbers that are equal bit for bit need all 31 passes.

Source: the search without sorting, FlashInfer's sampling (https://flashinfer.ai/2025/03/10/sampling.html).
"""

from __future__ import annotations

import triton
import triton.language as tl

INFINITE = tl.constexpr(0x7F800000)
"""Bits of infinity, above those of every finite number."""


@triton.jit
def bits_of(x):
    """The bits as int32, which order like the numbers if none is negative."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def reaching(base, first, stop, bits, WIDTH: tl.constexpr):
    """(count, sum) of the numbers at first … stop - 1 whose bits are at least `bits`."""
    at = tl.arange(0, WIDTH)
    count, total = tl.zeros([WIDTH], tl.int32), tl.zeros([WIDTH], tl.float32)
    for start in range(first, stop, WIDTH):
        x = tl.load(base + start + at, mask=start + at < stop, other=0.0)
        taken = bits_of(x) >= bits
        count += taken.to(tl.int32)
        total += tl.where(taken, x, 0.0)
    return tl.sum(count, 0), tl.sum(total, 0)


@triton.jit
def enough(count, total, least, most, need):
    """Whether the selection is complete."""
    return (count >= least) & ((count >= most) | (total >= need))


@triton.jit
def edge(base, first, stop, least, most, need, WIDTH: tl.constexpr):
    """(low, high, last), with which `beyond` selects among the numbers at first … stop - 1.

    It selects the largest ones, of equal ones those at lower places, until their sum reaches `need`; but at least
    `least`, and otherwise at most `most` (`least` takes precedence). Zeros are never selected.
    """
    low = tl.full([], 1, tl.int32)
    high = tl.full([], INFINITE, tl.int32)
    low_count, low_total = reaching(base, first, stop, low, WIDTH)
    high_count, high_total = low_count * 0, low_total * 0.0
    last = stop + 0 * low
    if enough(high_count, high_total, least, most, need):
        low = high
    elif not enough(low_count, low_total, least, most, need):
        high = low
    else:
        while (high - low > 1) & (low_count - high_count > 1):
            middle = low + (high - low) // 2
            count, total = reaching(base, first, stop, middle, WIDTH)
            if enough(count, total, least, most, need):
                low, low_count = middle, count
            else:
                high, high_count, high_total = middle, count, total
        equals = low_count - high_count
        if equals > 1:
            missing = tl.ceil((need - high_total) / low.to(tl.float32, bitcast=True))
            missing = tl.minimum(tl.maximum(missing, 0.0), equals.to(tl.float32)).to(tl.int32)
            wanted = tl.maximum(tl.minimum(high_count + missing, most), least) - high_count
            if wanted < equals:
                last = _place(base, first, stop, low, high, wanted, WIDTH)
    return low, high, last


@triton.jit
def _place(base, first, stop, low, high, number, WIDTH: tl.constexpr):
    """The place of the `number`-th one with low <= bits < high."""
    at = tl.arange(0, WIDTH)
    before = number * 0
    found = stop + 0 * number
    for start in range(first, stop, WIDTH):
        bits = bits_of(tl.load(base + start + at, mask=start + at < stop, other=0.0))
        equal = ((bits >= low) & (bits < high)).to(tl.int32)
        rank = before + tl.cumsum(equal, 0)
        found = tl.minimum(found, tl.min(tl.where((equal > 0) & (rank == number), start + at, stop), 0))
        before += tl.sum(equal, 0)
    return found


@triton.jit
def beyond(x, at, low, high, last):
    """Which of the numbers x at the places `at` are selected."""
    bits = bits_of(x)
    return (bits >= high) | ((bits >= low) & (at <= last))
