"""In what form a format of a bundle keeps a model: bits and scales of its matrices, numbers of its cache, files.

The bytes of the Hexagon's context binaries are measured: single products of 1024 to 11008 rows and columns, compiled by
onnxruntime-qnn 2.7 for v73 and v69, take their codes, 2 bytes for the scale of each block (whatever the type of the
scale that was given), and 6 to 20 bytes for each row. (4-bit matrices by rows take 8 bits a number where zero points of
0 are not written down.) Where prefill and decoding share a context, int8 matrices of queries or outputs, and of keys or
values, are in it twice. The code of a layer's two graphs is what SmolLM2-135M has besides, for 1024 tokens.

A portable ONNX decoder has ONNX Runtime's `MatMulNBits`, whose scales are as wide as what is multiplied: float32. What
it packs anew when it opens a model was measured on x86-64 with ONNX Runtime 1.3x, of models of 0.1 and 0.6 billion, and
what a step takes on SmolLM2-135M: 39 numbers for each of the hidden state and token, and logits of every token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transom.errors import OptionError
from transom.graph.weights import BITS
from transom.preparation.memory import CHUNK, weight_bytes

if TYPE_CHECKING:
    from transom.bundles.inventory import Matrix
    from transom.contract import Device
    from transom.graph.weights import Blocked
    from transom.signature import Decoder

PART_BYTES = 3_200_000_000
"""Bytes of weights in one context binary of the Hexagon. A context ends at 4 GB; activations, code and what two graphs
do not share are in it."""
SMALL_SHARE = 1 / 16
"""Of the weights of a layer, that a small product has at most."""
SMALLEST_BLOCK, LARGEST_BLOCK = 16, 256
"""Columns of a block of `MatMulNBits`."""


@dataclass(frozen=True)
class MatrixForm:
    """How the numbers of a matrix are kept."""

    bits: float
    block: int = 0
    """Numbers of a row that share a scale; 0: no scales but that of the row."""
    scale: float = 0
    """Bytes of a block's scale, and of its minimum or zero point."""
    row: int = 0
    """Bytes that each row takes besides."""
    packed: float = 1.0
    """Times of these bytes that the matrix takes in memory."""

    def bytes(self, rows: int, columns: int) -> int:
        blocks = -(-columns // self.block) if self.block else 0
        return rows * (math.ceil(columns * self.bits / 8 + blocks * self.scale) + self.row)

    def __str__(self) -> str:
        block = f", {self.scale:g} bytes for each {self.block} of them" if self.block else ""
        row = f", {self.row} bytes for each row" if self.row else ""
        return f"{self.bits:.3g} bits a number{block}{row}"


@dataclass(frozen=True)
class Form:
    """One way to keep a whole decoder."""

    format: str
    """`"qnn"`, `"onnx"`."""
    precision: str
    products: MatrixForm
    vocabulary: MatrixForm
    embedding: MatrixForm
    embedding_mapped: bool
    """The table lies in a file that is mapped, and the rows of a prompt are read of it."""
    rest: int
    """Bytes of a number of norms and biases."""
    cache: float
    """Bytes of a number in the cache."""
    static: bool
    """Shapes are fixed: a step reads all places of the cache, filled or not, windows or not."""
    chunk: int
    """Tokens of a prefill step."""
    activations: int = 16
    """Numbers that a token of a step takes besides its logits, for each number of the hidden state."""
    every_logit: bool = False
    """A step makes logits of all its tokens."""
    layer: int = 0
    """Bytes of a layer's compiled code, of both graphs where there are two."""
    part_bytes: int = 0
    """Bytes of weights that one compiled part may have; 0: all are in one."""
    kept_scale: int = 0
    """Matrices that the checkpoint has in integer blocks stay in them, with so many bytes for a scale or a minimum; 0:
    they are rounded anew."""
    shares_table: bool = False
    """A vocabulary matrix that is the table of embeddings, too, is there once."""
    shares_all: bool = True
    """Of two graphs that share their weights, each has all of them from there; False: half of attention's products are
    kept for each by itself."""
    small: MatrixForm | None = None
    """Of products that have at most `SMALL_SHARE` of their layer, as keys and values where query heads share them;
    None: as the others."""
    needs: str = ""
    """A feature of a Hexagon without which the format refuses the precision."""

    @property
    def name(self) -> str:
        return f"{self.format}, {self.precision}"

    def keeps(self, matrix: Matrix) -> MatrixForm | None:
        """The form of a matrix that stays as the checkpoint has it."""
        return kept(matrix.stored, self.kept_scale) if self.kept_scale and matrix.stored is not None else None

    def of(self, matrix: Matrix, form: MatrixForm) -> MatrixForm:
        """The form of a matrix where plain ones are to have `form`.

        Raises:
            OptionError: its rows are no multiple of a block, and the format has no other form for it.
        """
        if self.kept_scale and matrix.stored is not None:
            form = self.keeps(matrix) or _NBITS8
        if not form.block or matrix.columns % form.block == 0:
            return form
        if self.format == "onnx":
            return _F32
        raise OptionError(
            f"{self.format} with precision={self.precision!r} rounds blocks of {form.block} columns, and a matrix has "
            f"{matrix.columns}",
            "Use precision='int8'",
        )


def kept(stored: Blocked, scale: int) -> MatrixForm | None:
    """The form in which `MatMulNBits` has a matrix as it is stored; None where it has none.

    Args:
        scale: bytes of a scale, and of what stands for a minimum.
    """
    bits, block = BITS[stored.dtype], math.gcd(stored.block, LARGEST_BLOCK)
    if stored.dtype == "float8e4m3fn" or block < SMALLEST_BLOCK or stored.shape[1] % stored.block:
        return None
    centred = stored.dtype.startswith("int") and not stored.has_zero_points
    besides = scale if stored.has_minimums else 0 if centred else bits / 8
    return MatrixForm(bits, block, scale + besides, packed=_PACKED[bits])


_ROW = 16
_F16, _F32 = MatrixForm(16), MatrixForm(32)
_INT8, _INT4 = MatrixForm(8, row=_ROW), MatrixForm(4, block=32, scale=2, row=_ROW)
_PACKED = {4: 1.25, 8: 1.2}
"""Times of its bytes that a matrix of `MatMulNBits` takes in memory, by its bits."""
_NBITS8, _NBITS4 = (MatrixForm(bits, block=32, scale=4, packed=_PACKED[bits]) for bits in (8, 4))


def _qnn(
    precision: str, products: MatrixForm, cache: float, layer: int, *, vocabulary: MatrixForm = _INT8, needs: str = "",
    small: MatrixForm | None = None, shares_all: bool = True,
) -> Form:  # fmt: skip
    return Form(
        "qnn", precision, products, vocabulary, _F16, embedding_mapped=True, rest=2, cache=cache, static=True,
        chunk=128, layer=layer, part_bytes=PART_BYTES, shares_all=shares_all, small=small, needs=needs,
    )  # fmt: skip


def _onnx(precision: str, products: MatrixForm, table: MatrixForm, cache: float, kept_scale: int = 4) -> Form:
    return Form(
        "onnx", precision, products, table, table, embedding_mapped=False, rest=4, cache=cache, static=False,
        chunk=512, activations=40, every_logit=True, kept_scale=kept_scale, shares_table=True,
    )  # fmt: skip


_ROUNDED = "a16_attention"
_INT8_QNN, _INT4_ONNX = (
    _qnn("int8", _INT8, 1, 55_000, needs=_ROUNDED, shares_all=False),
    _onnx("int4", _NBITS4, _NBITS8, 4),
)
_EXACT = _onnx("exact", _F32, _F32, 4, kept_scale=0)
FORMS: Mapping[str, Mapping[str, Form]] = {
    "qnn": {
        "auto": _INT8_QNN,
        "int8": _INT8_QNN,
        "int4": _qnn("int4", _INT4, 1, 130_000, needs=_ROUNDED, small=_INT8),
        "f16": _qnn("f16", _F16, 2, 490_000, vocabulary=_F16),
    },
    "onnx": {
        "auto": _INT4_ONNX,
        "int4": _INT4_ONNX,
        "int8": _onnx("int8", _NBITS8, _NBITS8, 4),
        "f16": _onnx("f16", _F16, _F16, 2),
        "f32": _EXACT,
        "exact": _EXACT,
    },
}
"""By format and `precision`."""


def form_of(format: str, precision: str, decoder: Decoder, device: Device) -> Form:
    """How a format keeps a decoder in a precision; of a format that is not known here as `memory` plans for all.

    Raises:
        OptionError: the format does not have the precision, or not on this device.
    """
    forms = FORMS.get(format)
    if forms is None:
        form = MatrixForm(8 * weight_bytes(decoder, precision) / max(decoder.parameters, 1))
        cache = 4 if precision in ("f32", "exact") else 2
        return Form(format, precision, form, form, form, False, 4, cache, False, CHUNK, shares_table=True)
    hexagon = device.arch.startswith("hexagon_")  # the emulator stands for one that has all features
    able = [name for name, f in forms.items() if not (hexagon and f.needs and f.needs not in device.features)]
    if precision in able:
        return forms[precision]
    if precision == "auto":
        return forms[able[0]]
    where = f" on {device.id}" if precision in forms else ""
    raise OptionError(f"{format} has no precision={precision!r}{where}", f"It has {', '.join(able)}")
