"""Samples a token from each row of logits: greedy, or by temperature, top-k, top-p and a random number.

LOGITS [rows, vocabulary], float32. TEMPERATURE float32 [rows], 0: greedy; TOP_K int32 [rows], 0: all; TOP_P float32
[rows], 1: all; DRAWN float32 [rows], uniform in [0, 1), from the host's own generator, so that a seed gives the same
tokens on every backend; TOKENS int64 [rows]. Grid (rows).

Nothing is sorted. The k-th largest logit, and then the smallest logit of top-p, are found by bisection over the values:
after BISECTIONS passes over the row the bounds are adjacent float32 numbers. All tokens with a logit equal to the
threshold are kept. The sampled token is the first, in vocabulary order, at which the running sum of probabilities
exceeds the random number.

Source: Holtzman and others 2020 (arXiv:1904.09751) for top-p; for the search without sorting, FlashInfer's sampling
(https://flashinfer.ai/2025/03/10/sampling.html).
"""

from __future__ import annotations

import triton
import triton.language as tl

BISECTIONS = tl.constexpr(40)


@triton.jit
def sample(LOGITS, TEMPERATURE, TOP_K, TOP_P, DRAWN, TOKENS, vocabulary, row_stride, WIDTH: tl.constexpr):
    """See the module. WIDTH logits are processed at once."""
    row = tl.program_id(0).to(tl.int64)
    logits = LOGITS + row * row_stride
    at = tl.arange(0, WIDTH)
    top = tl.full([WIDTH], float("-inf"), tl.float32)
    low = tl.full([WIDTH], float("inf"), tl.float32)
    for start in range(0, vocabulary, WIDTH):
        inside = start + at < vocabulary
        x = tl.load(logits + start + at, mask=inside, other=float("-inf"))
        top = tl.maximum(top, x)
        low = tl.minimum(low, tl.where(inside & (x > float("-inf")), x, float("inf")))
    most, least = tl.max(top, 0), tl.min(low, 0)
    temperature = tl.load(TEMPERATURE + row)
    edge = most
    if temperature > 0:
        # The largest threshold that at least k logits reach.
        edge = least
        k = tl.load(TOP_K + row)
        if (k > 0) & (k < vocabulary):
            below, above = least, most
            for _ in range(BISECTIONS):
                middle = below + 0.5 * (above - below)
                count = tl.zeros([WIDTH], tl.int32)
                for start in range(0, vocabulary, WIDTH):
                    x = tl.load(logits + start + at, mask=start + at < vocabulary, other=float("-inf"))
                    count += (x >= middle).to(tl.int32)
                if tl.sum(count, 0) >= k:
                    below = middle
                else:
                    above = middle
            edge = below
        p = tl.load(TOP_P + row)
        if p < 1:
            # The largest threshold at which the remaining tokens have top_p of the mass that top-k leaves.
            whole = _mass(logits, at, vocabulary, most, edge, temperature, WIDTH)
            below, above = edge, most
            for _ in range(BISECTIONS):
                middle = below + 0.5 * (above - below)
                if _mass(logits, at, vocabulary, most, middle, temperature, WIDTH) >= p * whole:
                    below = middle
                else:
                    above = middle
            edge = below
        share = tl.load(DRAWN + row) * _mass(logits, at, vocabulary, most, edge, temperature, WIDTH)
    else:
        temperature, share = 1.0, 0.0 * most
    before = 0.0 * most
    found, last = vocabulary + 0 * row, 0 * row
    for start in range(0, vocabulary, WIDTH):
        x = tl.load(logits + start + at, mask=start + at < vocabulary, other=float("-inf"))
        kept = x >= edge
        mass = tl.where(kept, tl.exp((x - most) / temperature), 0.0)
        reached = kept & (before + tl.cumsum(mass, 0) > share)
        found = tl.minimum(found, tl.min(tl.where(reached, start + at, vocabulary), 0))
        last = tl.maximum(last, tl.max(tl.where(kept, start + at, 0), 0))
        before += tl.sum(mass, 0)
    # Through rounding the total may stay below the share; then the last kept token is sampled.
    tl.store(TOKENS + row, tl.where(found < vocabulary, found, last))


@triton.jit
def _mass(logits, at, vocabulary, most, edge, temperature, WIDTH: tl.constexpr):
    """The sum of exp((x - most) / temperature) over the logits that reach a threshold."""
    mass = tl.zeros([WIDTH], tl.float32)
    for start in range(0, vocabulary, WIDTH):
        x = tl.load(logits + start + at, mask=start + at < vocabulary, other=float("-inf"))
        mass += tl.where(x >= edge, tl.exp((x - most) / temperature), 0.0)
    return tl.sum(mass, 0)
