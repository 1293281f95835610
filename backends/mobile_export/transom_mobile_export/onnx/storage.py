"""How a portable decoder is stored, for the plan of an export.

Matrices are those of ONNX Runtime's `MatMulNBits`, whose scales have the dtype of the inputs: float32. Memory for
repacking at load was measured on x86-64 with ONNX Runtime 1.3x, for models of 0.1 and 0.6 billion parameters. The
memory of a step was measured on SmolLM2-135M: 39 numbers per token and hidden column, and logits of every token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from transom.contract_optional import KeptBlocks, MatrixForm, StorageForm
from transom.errors import OptionError, option
from transom.graph.weights import BITS
from transom_mobile_export.onnx.compiling import CHUNK, ROWS
from transom_mobile_export.onnx.packing import block_of
from transom_mobile_export.published import published

if TYPE_CHECKING:
    from transom.graph.weights import Blocked
    from transom.signature import Decoder

SCALE = 4
"""Bytes of a scale and of a minimum: float32."""
_PACKED = {4: 1.25, 8: 1.2}
"""Bytes in memory for each byte of a matrix in the file, by its bits."""
F16, F32 = MatrixForm(16), MatrixForm(32)
INT8, INT4 = (MatrixForm(bits, block=32, scale=SCALE, packed=_PACKED[bits]) for bits in (8, 4))


def kept(stored: Blocked) -> MatrixForm | None:
    """The form in which `MatMulNBits` holds a matrix as stored; None if it cannot."""
    if not (block := block_of(stored)):
        return None
    bits = BITS[stored.dtype]
    centered = stored.dtype.startswith("int") and not stored.has_zero_points
    besides = SCALE if stored.has_minimums else 0 if centered else bits / 8
    return MatrixForm(bits, block, SCALE + besides, packed=_PACKED[bits])


_INT4 = StorageForm(
    "onnx", "int4", INT4, INT8, INT8, rest=4, cache=4, chunk=CHUNK, ragged=F32, activations=ROWS, every_logit=True,
    kept=KeptBlocks(kept, INT8, "scales and minimums of 4 bytes each"), file="onnx/model.onnx.data", shares_table=True,
)  # fmt: skip
_EXACT = replace(_INT4, precision="exact", products=F32, vocabulary=F32, embedding=F32, kept=None)
FORMS: Mapping[str, StorageForm] = {
    "auto": _INT4,
    "int4": _INT4,
    "int8": replace(_INT4, precision="int8", products=INT8),
    "f16": replace(_INT4, precision="f16", products=F16, vocabulary=F16, embedding=F16, cache=2),
    "f32": _EXACT,
    "exact": _EXACT,
}
"""Storage forms by `precision`."""


def form_of(decoder: Decoder, precision: str) -> StorageForm:
    """How a decoder is stored. Raises OptionError if the precision is unknown."""
    if precision not in FORMS:
        raise OptionError(f"onnx has no {option('precision', precision)}", f"It has {', '.join(FORMS)}")
    return replace(FORMS[precision], published=published(decoder))
