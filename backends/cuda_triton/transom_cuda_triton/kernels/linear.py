"""Activations times weights in blocks: 4-bit and 8-bit integers with a scale for each block, never unpacked in memory.

X [rows, columns] and OUT [rows, outputs], float16, bfloat16 or float32; sums are float32. SCALES [outputs, blocks] and,
where OFFSET says so, OFFSETS [outputs, blocks]; blocks = columns / BLOCK. A weight is (quant - ZERO) * scale, or
quant * scale + offset. QUANTS uint8: of 8 bits [outputs, columns]; of 4 bits [outputs, columns / 2], where byte i of a
block of BLOCK columns has the weight of column i below and that of column i + BLOCK / 2 above. So both halves of the
bytes meet contiguous activations, and nothing is interleaved.

`multiply_many` (prefill): grid (ceil(rows / ROWS), ceil(outputs / OUTPUTS)), products on the tensor cores.
`multiply_few` (decode): grid (rows, ceil(outputs / OUTPUTS)), one row of activations, products and sums on plain cores:
what counts is that every byte of the weights is read once, in long runs.

Sources: blocks of GGUF (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md); fused dequantisation, as in
Frantar and others 2024 (MARLIN, arXiv:2408.11743).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _weights(
    QUANTS, SCALES, OFFSETS, output, real, start, columns,
    BITS: tl.constexpr, BLOCK: tl.constexpr, OFFSET: tl.constexpr, ZERO: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Weights of WIDTH columns of first halves of blocks, float32 [outputs, WIDTH], those of their partners in the
    second halves, and which columns these are. `start` is twice the number of first halves before them.
    """
    i = start // 2 + tl.arange(0, WIDTH)
    blocks = columns // BLOCK
    half: tl.constexpr = BLOCK // 2
    block, inside = i // half, i % half
    low_at = block * BLOCK + inside
    high_at = low_at + half
    row = output.to(tl.int64)[:, None]
    seen = real[:, None] & (i < columns // 2)[None, :]
    if BITS == 4:
        q = tl.load(QUANTS + row * (columns // 2) + i[None, :], mask=seen, other=0)
        low, high = (q & 15).to(tl.float32), (q >> 4).to(tl.float32)
    else:
        low = tl.load(QUANTS + row * columns + low_at[None, :], mask=seen, other=0).to(tl.float32)
        high = tl.load(QUANTS + row * columns + high_at[None, :], mask=seen, other=0).to(tl.float32)
    scale = tl.load(SCALES + row * blocks + block[None, :], mask=seen, other=0.0).to(tl.float32)
    if OFFSET:
        offset = tl.load(OFFSETS + row * blocks + block[None, :], mask=seen, other=0.0).to(tl.float32)
        return low * scale + offset, high * scale + offset, low_at, high_at
    return (low - ZERO) * scale, (high - ZERO) * scale, low_at, high_at


@triton.jit
def multiply_many(
    X, QUANTS, SCALES, OFFSETS, OUT, rows, outputs, columns, x_token, out_token,
    BITS: tl.constexpr, BLOCK: tl.constexpr, OFFSET: tl.constexpr, ZERO: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """See the module. A step takes 2 * WIDTH columns; WIDTH is a power of two, 16 or more."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    real_row, real = row < rows, output < outputs
    x = X + row.to(tl.int64)[:, None] * x_token
    acc = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for start in range(0, columns, 2 * WIDTH):
        low, high, low_at, high_at = _weights(
            QUANTS, SCALES, OFFSETS, output, real, start, columns, BITS, BLOCK, OFFSET, ZERO, WIDTH
        )
        a = tl.load(x + low_at[None, :], mask=real_row[:, None] & (low_at < columns)[None, :], other=0.0)
        b = tl.load(x + high_at[None, :], mask=real_row[:, None] & (high_at < columns)[None, :], other=0.0)
        acc = tl.dot(a, tl.trans(low.to(a.dtype)), acc)
        acc = tl.dot(b, tl.trans(high.to(b.dtype)), acc)
    out = OUT + row.to(tl.int64)[:, None] * out_token + output[None, :]
    tl.store(out, acc.to(OUT.dtype.element_ty), mask=real_row[:, None] & real[None, :])


@triton.jit
def multiply_few(
    X, QUANTS, SCALES, OFFSETS, OUT, outputs, columns, x_token, out_token,
    BITS: tl.constexpr, BLOCK: tl.constexpr, OFFSET: tl.constexpr, ZERO: tl.constexpr,
    OUTPUTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """See the module."""
    row = tl.program_id(0).to(tl.int64)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    real = output < outputs
    x = X + row * x_token
    acc = tl.zeros([OUTPUTS, WIDTH], tl.float32)
    for start in range(0, columns, 2 * WIDTH):
        low, high, low_at, high_at = _weights(
            QUANTS, SCALES, OFFSETS, output, real, start, columns, BITS, BLOCK, OFFSET, ZERO, WIDTH
        )
        a = tl.load(x + low_at, mask=low_at < columns, other=0.0).to(tl.float32)
        b = tl.load(x + high_at, mask=high_at < columns, other=0.0).to(tl.float32)
        acc += low * a[None, :] + high * b[None, :]
    tl.store(OUT + row * out_token + output, tl.sum(acc, 1).to(OUT.dtype.element_ty), mask=real)
