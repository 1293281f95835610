"""Products of activations with quantized weights, integers in blocks or float8 (E4M3), which are unpacked in registers.

X [rows, columns] and OUT [rows, outputs], float16, bfloat16 or float32; sums are float32. The grid is
(ceil(rows / ROWS), ceil(outputs / OUTPUTS)); in the `multiply_few` kernels a program has one row.

**Integers** of 4 or 8 bits, with a scale for each block of BLOCK columns: SCALES [outputs, blocks], and OFFSETS
[outputs, blocks] if OFFSET is set. A weight is (quant - ZERO) * scale, or quant * scale + offset. The kernels take
blocks and compute columns = blocks * BLOCK, so the compiler knows the alignment of rows. QUANTS is uint8
[outputs, columns] for 8 bits and [outputs, columns / 2] for 4 bits. In the latter, byte i of a block has column i in
its low half and column i + BLOCK / 2 in its high half, so both halves are multiplied by contiguous activations.

`multiply_many` (prefill) computes on the tensor cores. `multiply_few` (decode) multiplies one row of activations on
CUDA cores; it is bound by memory, and reads every byte of the weights once, in long runs.

**float8**, with one float32 scale per row of weights: QUANTS float8 [outputs, columns], SCALES [outputs]; a weight is
quant * scale; columns = blocks * 16. For sm_89 and newer.

`multiply_few_float8` widens the weights to float32 in registers and does not quantize activations.
`multiply_many_float8` multiplies float8 by float8 on the tensor cores, twice as fast as float16. Its activations are
CODES float8 [rows, columns] with ROW_SCALES float32 [rows], both from `quantize_rows`, grid (rows,). Quantization is a
kernel of its own: inside the product, each of the ceil(outputs / OUTPUTS) programs of a row would repeat it, and
activations could not be copied to shared memory directly. As a kernel it reads each number once from memory (and once
from cache), and halves the bytes that the product reads. Each row has one scale, from its largest number, because the
magnitudes of activations differ far more between tokens than within one.

The tensor cores of sm_89 and sm_90 accumulate products of float8 with only about 14 bits, as the authors of DeepSeek-V3
and SageAttention2 found. So at most WIDTH columns are summed there; these partial sums are added in float32.

Sources: blocks of GGUF (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md); fused dequantization, as in
Frantar and others 2024 (MARLIN, arXiv:2408.11743); E4M3: Micikevicius and others 2022 (FP8 Formats for Deep Learning,
arXiv:2209.05433); sums: DeepSeek-AI 2024 (arXiv:2412.19437, 3.3.2), Zhang and others 2024 (arXiv:2411.10958).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _weights(
    QUANTS, SCALES, OFFSETS, output, real, start, columns,
    BITS: tl.constexpr, BLOCK: tl.constexpr, OFFSET: tl.constexpr, ZERO: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """(low, high, low_at, high_at): weights of WIDTH columns in the first halves of blocks and of the corresponding
    columns in the second halves, float32 [outputs, WIDTH], and the column indices of both. `start` is the number of
    columns before these.
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
    X, QUANTS, SCALES, OFFSETS, OUT, rows, outputs, blocks, x_token, out_token,
    BITS: tl.constexpr, BLOCK: tl.constexpr, OFFSET: tl.constexpr, ZERO: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """See the module. A step takes 2 * WIDTH columns; WIDTH is a power of two, 16 or more."""
    columns = blocks * BLOCK
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
        acc = tl.dot(a, tl.trans(low.to(a.dtype)), acc, input_precision="ieee")
        acc = tl.dot(b, tl.trans(high.to(b.dtype)), acc, input_precision="ieee")
    out = OUT + row.to(tl.int64)[:, None] * out_token + output[None, :]
    tl.store(out, acc.to(OUT.dtype.element_ty), mask=real_row[:, None] & real[None, :])


@triton.jit
def multiply_few(
    X, QUANTS, SCALES, OFFSETS, OUT, outputs, blocks, x_token, out_token,
    BITS: tl.constexpr, BLOCK: tl.constexpr, OFFSET: tl.constexpr, ZERO: tl.constexpr,
    OUTPUTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """See the module."""
    columns = blocks * BLOCK
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


@triton.jit
def _round_to_e4m3(x):
    """float32 of at most 448, rounded to the nearest E4M3 number, ties to even: three bits of mantissa, and steps of
    2^-9 below 2^-6.

    It adds and subtracts a number whose last bit has the value of one step. The following conversion to float8 is then
    exact, which is needed because that of Triton's interpreter rounds wrongly. On a card the kernel is bound by memory,
    so these operations cost no time.
    """
    power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    shift = tl.maximum(power, 0.015625) * 1572864.0  # 1.5 * 2^20 times the power of two below |x|
    return (x + shift) - shift


@triton.jit
def quantize_rows(X, CODES, ROW_SCALES, blocks, x_token, codes_token, WIDTH: tl.constexpr):
    """Quantize rows of X to CODES * ROW_SCALES, see the module. A row with NaN or infinity gets the scale NaN."""
    columns = blocks * 16
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, WIDTH)
    x = X + row * x_token
    largest = tl.zeros([WIDTH], tl.float32)
    for start in range(0, columns, WIDTH):
        size = tl.abs(tl.load(x + start + c, mask=start + c < columns, other=0.0).to(tl.float32))
        largest = tl.maximum(largest, tl.where(size < float("inf"), size, float("inf")))
    most = tl.max(largest, 0)
    finite = most < float("inf")
    most = tl.maximum(tl.where(finite, most, 1.0), 1e-30)
    inverse = 448.0 / most
    for start in range(0, columns, WIDTH):
        y = tl.load(x + start + c, mask=start + c < columns, other=0.0).to(tl.float32)
        y = tl.where(finite, y, 0.0) * inverse
        codes = _round_to_e4m3(y).to(CODES.dtype.element_ty)
        tl.store(CODES + row * codes_token + start + c, codes, mask=start + c < columns)
    tl.store(ROW_SCALES + row, tl.where(finite, most / 448.0, float("nan")))


@triton.jit
def multiply_many_float8(
    CODES, ROW_SCALES, QUANTS, SCALES, OUT, rows, outputs, blocks, codes_token, out_token,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """See the module. A step takes WIDTH columns, a power of two, 32 or more."""
    columns = blocks * 16
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    real_row, real = row < rows, output < outputs
    x = CODES + row.to(tl.int64)[:, None] * codes_token
    w = QUANTS + output.to(tl.int64)[:, None] * columns
    acc = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for start in range(0, columns, WIDTH):
        c = start + tl.arange(0, WIDTH)[None, :]
        a = tl.load(x + c, mask=real_row[:, None] & (c < columns), other=0.0)
        b = tl.load(w + c, mask=real[:, None] & (c < columns), other=0.0)
        acc += tl.dot(a, tl.trans(b), max_num_imprecise_acc=WIDTH)
    acc = acc * tl.load(ROW_SCALES + row, mask=real_row, other=0.0)[:, None]
    acc = acc * tl.load(SCALES + output, mask=real, other=0.0)[None, :]
    out = OUT + row.to(tl.int64)[:, None] * out_token + output[None, :]
    tl.store(out, acc.to(OUT.dtype.element_ty), mask=real_row[:, None] & real[None, :])


@triton.jit
def multiply_few_float8(
    X, QUANTS, SCALES, OUT, outputs, blocks, x_token, out_token, OUTPUTS: tl.constexpr, WIDTH: tl.constexpr
):
    """See the module. A step takes WIDTH columns."""
    columns = blocks * 16
    row = tl.program_id(0).to(tl.int64)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    real = output < outputs
    x = X + row * x_token
    w = QUANTS + output.to(tl.int64)[:, None] * columns
    acc = tl.zeros([OUTPUTS, WIDTH], tl.float32)
    for start in range(0, columns, WIDTH):
        c = start + tl.arange(0, WIDTH)
        a = tl.load(x + c, mask=c < columns, other=0.0).to(tl.float32)
        q = tl.load(w + c[None, :], mask=real[:, None] & (c < columns)[None, :], other=0.0).to(tl.float32)
        acc += q * a[None, :]
    out = tl.sum(acc, 1) * tl.load(SCALES + output, mask=real, other=0.0)
    tl.store(OUT + row * out_token + output, out.to(OUT.dtype.element_ty), mask=real)
