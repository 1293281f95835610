"""RMSNorm of a row, and of a row after a residual was added to it.

X, RESIDUAL, OUT [rows, columns], float16, bfloat16 or float32; WEIGHT [columns]. With RESIDUAL, the sum x + residual is
rounded to the form of RESIDUAL and stored there first, and it is what is normalised: the next layer's residual. Squares
and their sum are float32. Grid (rows). A row is read once: WIDTH, a power of two, holds it.

Source: Zhang and Sennrich 2019 (arXiv:1910.07467), as ONNX `RMSNormalization` has it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rms_norm(
    X, RESIDUAL, WEIGHT, OUT, columns, x_token, residual_token, out_token, epsilon,
    WIDTH: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """See the module."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, WIDTH)
    inside = c < columns
    x = tl.load(X + row * x_token + c, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        before = RESIDUAL + row * residual_token + c
        x = (x + tl.load(before, mask=inside, other=0.0).to(tl.float32)).to(RESIDUAL.dtype.element_ty)
        tl.store(before, x, mask=inside)
        x = x.to(tl.float32)
    share = tl.rsqrt(tl.sum(x * x, 0) / columns + epsilon)
    weight = tl.load(WEIGHT + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(OUT + row * out_token + c, (x * share * weight).to(OUT.dtype.element_ty), mask=inside)
