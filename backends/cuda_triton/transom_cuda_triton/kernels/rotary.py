"""Rotary embedding of queries, in place. `append` rotates new keys as it writes them to the cache.

X [tokens, heads * head_dim], float16, bfloat16 or float32; POSITIONS int32 [tokens]; COS and SIN float32
[positions, rotated / 2]. A row is a head of a token: `rows` = tokens * heads. Grid (ceil(rows / ROWS)). The first
ROTATED columns of a head are rotated in pairs: column i with column i + ROTATED / 2 or, if INTERLEAVED, column 2 i with
column 2 i + 1.

Source: Su and others 2021 (arXiv:2104.09864), as in ONNX `RotaryEmbedding`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rotate(
    X, POSITIONS, COS, SIN, rows, heads, x_token,
    HEAD: tl.constexpr, ROTATED: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """See the module. WIDTH is a power of two, at least ROTATED / 2."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    half: tl.constexpr = ROTATED // 2
    token, head = row // heads, row % heads
    h = tl.arange(0, WIDTH)
    there = (row < rows)[:, None] & (h < half)[None, :]
    position = tl.load(POSITIONS + token, mask=row < rows, other=0)
    angle = position[:, None] * half + h[None, :]
    c, s = tl.load(COS + angle, mask=there, other=0.0), tl.load(SIN + angle, mask=there, other=0.0)
    a_at, b_at = (2 * h, 2 * h + 1) if INTERLEAVED else (h, half + h)
    x = X + token.to(tl.int64)[:, None] * x_token + head[:, None] * HEAD
    a = tl.load(x + a_at[None, :], mask=there, other=0.0).to(tl.float32)
    b = tl.load(x + b_at[None, :], mask=there, other=0.0).to(tl.float32)
    tl.store(x + a_at[None, :], (a * c - b * s).to(X.dtype.element_ty), mask=there)
    tl.store(x + b_at[None, :], (b * c + a * s).to(X.dtype.element_ty), mask=there)
