"""Stores queries of a step in the ring from which decoding selects columns.

Q [tokens, WIDTH], WIDTH = kv_heads * group * head_dim, rotated; RING [slots, 16, WIDTH] of the same type; REMEMBERED
int32 [n, 3]: the row of a query among the step's tokens, or -1; the slot of its sequence; its place in the ring, which
is position / 4 % 16, for positions with position % 4 = 3. No place occurs twice.

Grid (n, ceil(WIDTH / 1024)). Runs after the step's columns are selected, since that reads the earlier queries.
"""

from __future__ import annotations

import triton
import triton.language as tl

PLACES = tl.constexpr(16)
PART = tl.constexpr(1024)


@triton.jit
def remember(Q, RING, REMEMBERED, q_token, WIDTH: tl.constexpr):
    """See the module."""
    entry, part = tl.program_id(0), tl.program_id(1)
    row, slot = tl.load(REMEMBERED + 3 * entry), tl.load(REMEMBERED + 3 * entry + 1)
    place = tl.load(REMEMBERED + 3 * entry + 2)
    if row < 0:
        return
    at = part * PART + tl.arange(0, PART)
    inside = at < WIDTH
    x = tl.load(Q + row.to(tl.int64) * q_token + at, mask=inside)
    tl.store(RING + (slot * PLACES + place).to(tl.int64) * WIDTH + at, x, mask=inside)
