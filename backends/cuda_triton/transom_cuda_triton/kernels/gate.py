"""Gated activations: SwiGLU and GeGLU, of a product that has the gate's columns before the others.

X [rows, 2 * columns], OUT [rows, columns], float16, bfloat16 or float32; computed in float32. OUT = act(X[:, :columns])
* X[:, columns:], act silu or gelu with tanh. Grid (rows, ceil(columns / WIDTH)).

Source: Shazeer 2020 (arXiv:2002.05202).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gate(X, OUT, columns, x_token, out_token, WIDTH: tl.constexpr, GELU: tl.constexpr):
    """See the module."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = c < columns
    x = tl.load(X + row * x_token + c, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(X + row * x_token + columns + c, mask=inside, other=0.0).to(tl.float32)
    if GELU:  # x / 2 * (1 + tanh(y)) = x * sigmoid(2 y)
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        x = x * tl.sigmoid(x)
    tl.store(OUT + row * out_token + c, (x * up).to(OUT.dtype.element_ty), mask=inside)
