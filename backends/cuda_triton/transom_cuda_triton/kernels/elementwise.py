"""Elementwise operators between products: scale, bias, sum with another row, soft cap.

X, OTHER and OUT [rows, columns], float16, bfloat16 or float32, each with its own stride; BIAS float32 [columns].
OUT = cap(X * factor + BIAS + OTHER), cap(x) = cap * tanh(x / cap); computed in float32. OUT may be X or OTHER.
Grid (ceil(rows / ROWS), ceil(columns / WIDTH)).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def combine(
    X, BIAS, OTHER, OUT, rows, columns, factor, cap, x_token, other_token, out_token,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, WITH_BIAS: tl.constexpr, WITH_OTHER: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """See the module."""
    r = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    c = (tl.program_id(1) * WIDTH + tl.arange(0, WIDTH))[None, :]
    inside = (r < rows) & (c < columns)
    x = tl.load(X + r * x_token + c, mask=inside, other=0.0).to(tl.float32) * factor
    if WITH_BIAS:
        x += tl.load(BIAS + c, mask=c < columns, other=0.0)
    if WITH_OTHER:
        x += tl.load(OTHER + r * other_token + c, mask=inside, other=0.0).to(tl.float32)
    if CAPPED:  # tanh(y) = 2 sigmoid(2 y) - 1
        x = (2.0 * tl.sigmoid(x * (2.0 / cap)) - 1.0) * cap
    tl.store(OUT + r * out_token + c, x.to(OUT.dtype.element_ty), mask=inside)
