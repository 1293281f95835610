"""RMSNorm of rows, with an optional addition of a residual before it.

X, RESIDUAL, OUT [tokens, groups * columns], float16, bfloat16 or float32, each with its own stride; each group, such as
an attention head, is normalized by itself, so `rows` = tokens * groups. WEIGHT float32 [columns]. With RESIDUAL, the
sum x + residual is first rounded to RESIDUAL's type and stored there as the next layer's residual; this sum is then
normalized. Squares and their sum are float32. Grid (ceil(rows / ROWS)). A row is read once: WIDTH, a power of two, is
at least columns.

Source: Zhang and Sennrich 2019 (arXiv:1910.07467), as in ONNX `RMSNormalization`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rms_norm(
    X, RESIDUAL, WEIGHT, OUT, rows, groups, columns, x_token, residual_token, out_token, epsilon,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """See the module."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, begin = (row // groups).to(tl.int64)[:, None], (row % groups * columns)[:, None]
    c = tl.arange(0, WIDTH)[None, :]
    inside = (row < rows)[:, None] & (c < columns)
    x = tl.load(X + token * x_token + begin + c, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        before = RESIDUAL + token * residual_token + begin + c
        x = (x + tl.load(before, mask=inside, other=0.0).to(tl.float32)).to(RESIDUAL.dtype.element_ty)
        tl.store(before, x, mask=inside)
        x = x.to(tl.float32)
    share = tl.rsqrt(tl.sum(x * x, 1) / columns + epsilon)[:, None]
    weight = tl.load(WEIGHT + c, mask=c < columns, other=0.0)
    tl.store(OUT + token * out_token + begin + c, (x * share * weight).to(OUT.dtype.element_ty), mask=inside)
