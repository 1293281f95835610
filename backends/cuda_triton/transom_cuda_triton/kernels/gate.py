"""Gated activations: SwiGLU and GeGLU.

GATE, UP and OUT [rows, columns], float16, bfloat16 or float32, each with its own stride; computed in float32.
OUT = act(GATE) * UP. Grid (ceil(rows / ROWS), ceil(columns / WIDTH)).

Source: Shazeer 2020 (arXiv:2002.05202); GELU as in ONNX `Gelu`, exact or by tanh.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gate(
    GATE, UP, OUT, rows, columns, gate_token, up_token, out_token,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """See the module. ACT 0: SiLU; 1: GELU; 2: GELU by tanh."""
    r = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    c = (tl.program_id(1) * WIDTH + tl.arange(0, WIDTH))[None, :]
    inside = (r < rows) & (c < columns)
    x = tl.load(GATE + r * gate_token + c, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(UP + r * up_token + c, mask=inside, other=0.0).to(tl.float32)
    if ACT == 0:
        x = x * tl.sigmoid(x)
    elif ACT == 1:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:  # x / 2 * (1 + tanh(y)) = x * sigmoid(2 y)
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    tl.store(OUT + r * out_token + c, (x * up).to(OUT.dtype.element_ty), mask=inside)
