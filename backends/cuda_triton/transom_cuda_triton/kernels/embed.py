"""The embedding: rows of a table by token id. The table is dense, or quantized in the blocks of `linear`.

IDS int64 [tokens]; OUT [tokens, columns], float16, bfloat16 or float32; OUT = factor * row. A dense TABLE is
[vocabulary, columns]; QUANTS, SCALES and OFFSETS are as in `transom_cuda_triton.kernels.linear`. Grid
(ceil(tokens / ROWS), ceil(columns / WIDTH)).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def embed(IDS, TABLE, OUT, rows, columns, factor, out_token, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """See the module."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = (tl.program_id(1) * WIDTH + tl.arange(0, WIDTH))[None, :]
    inside = (r < rows)[:, None] & (c < columns)
    id = tl.load(IDS + r, mask=r < rows, other=0)[:, None]
    x = tl.load(TABLE + id * columns + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(OUT + r.to(tl.int64)[:, None] * out_token + c, (x * factor).to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def embed_blocks(
    IDS, QUANTS, SCALES, OFFSETS, OUT, rows, columns, factor, out_token,
    BITS: tl.constexpr, BLOCK: tl.constexpr, OFFSET: tl.constexpr, ZERO: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """See the module."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = (tl.program_id(1) * WIDTH + tl.arange(0, WIDTH))[None, :]
    inside = (r < rows)[:, None] & (c < columns)
    half: tl.constexpr = BLOCK // 2
    blocks = columns // BLOCK
    id = tl.load(IDS + r, mask=r < rows, other=0)[:, None]
    block, place = c // BLOCK, c % BLOCK
    if BITS == 4:
        byte = tl.load(QUANTS + id * (columns // 2) + block * half + place % half, mask=inside, other=0)
        q = tl.where(place < half, byte & 15, byte >> 4).to(tl.float32)
    else:
        q = tl.load(QUANTS + id * columns + c, mask=inside, other=0).to(tl.float32)
    scale = tl.load(SCALES + id * blocks + block, mask=inside, other=0.0).to(tl.float32)
    if OFFSET:
        x = q * scale + tl.load(OFFSETS + id * blocks + block, mask=inside, other=0.0).to(tl.float32)
    else:
        x = (q - ZERO) * scale
    tl.store(OUT + r.to(tl.int64)[:, None] * out_token + c, (x * factor).to(OUT.dtype.element_ty), mask=inside)
