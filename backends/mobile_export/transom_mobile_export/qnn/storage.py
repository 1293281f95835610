"""How context binaries store a decoder, for the plan of an export and for cutting a model into parts.

The sizes are measured: single products of 1024 to 11008 rows and columns, compiled by onnxruntime-qnn 2.7 for v73 and
v69, take their codes, 2 bytes for the scale of each block (for any dtype of the given scale), and 6 to 20 bytes for
each row. (4-bit matrices by rows take 8 bits per number unless zero points of 0 are written.) If prefill and decoding
share a context, it contains int8 matrices of queries or outputs, and of keys or values, twice. The code of a layer's
two graphs is the remainder for SmolLM2-135M with 1024 tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from transom.contract_optional import MatrixForm, StorageForm
from transom.errors import OptionError, option
from transom_mobile_export.published import published
from transom_mobile_export.qnn.layout import CHUNK, EMBEDDING_FILE, LARGEST
from transom_mobile_export.qnn.precision import BLOCK, SMALL_SHARE

if TYPE_CHECKING:
    from transom.contract import Device
    from transom.signature import Decoder

ROW = 16
"""Additional bytes for each row of an integer matrix."""
F16, INT8, INT4 = MatrixForm(16), MatrixForm(8, row=ROW), MatrixForm(4, block=BLOCK, scale=2, row=ROW)

_INT8 = StorageForm(
    "qnn", "int8", INT8, INT8, F16, rest=2, cache=1, static=True, chunk=CHUNK, layer=55_000, part_bytes=LARGEST,
    attention_twice="half", file="qnn-{target}/part{part}", mapped_table=EMBEDDING_FILE,
)  # fmt: skip
FORMS: Mapping[str, StorageForm] = {
    "auto": _INT8,
    "int8": _INT8,
    "int4": replace(
        _INT8, precision="int4", products=INT4, small=INT8, small_share=SMALL_SHARE, instead="int8", layer=130_000,
        attention_twice="up to half",
    ),
    "f16": replace(
        _INT8, precision="f16", products=F16, vocabulary=F16, cache=2, layer=490_000, attention_twice="up to half"
    ),
}  # fmt: skip
"""Storage forms by `precision`, on a chip whose graphs share their weights."""


def form_on(decoder: Decoder, device: Device, precision: str) -> StorageForm:
    """How a decoder is stored for a chip.

    Raises:
        OptionError: the precision is unknown, or this chip does not support it.
    """
    quantized = "a16_attention" in device.features or not device.arch.startswith("hexagon_")  # the emulator has it
    able = [name for name, form in FORMS.items() if quantized or form.products is F16]
    if precision not in able and precision != "auto":
        where = f" on {device.id}" if precision in FORMS else ""
        raise OptionError(f"qnn has no {option('precision', precision)}{where}", f"It has {', '.join(able)}")
    form = replace(FORMS[precision if precision in able else able[0]], published=published(decoder))
    return on_chip(form, device)


def on_chip(form: StorageForm, device: Device) -> StorageForm:
    """A form on a chip: if the graphs for prefill and decoding cannot share weights, each has its own."""
    return form if "weight_sharing" in device.features else replace(form, copies=2, attention_twice="no")
