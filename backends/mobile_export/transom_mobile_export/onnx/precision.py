"""The compute precision of a portable decoder, from the option `precision`.

| `precision` | Meaning |
|---|---|
| `exact`, `f32` | float32 throughout, quantized matrices unpacked; for checking, not for phones |
| `f16` | plain matrices, their products and the cache in float16 |
| `int8` | plain matrices in int8, a scale for each 32 columns |
| `int4` | plain matrices in int4, a scale for each 32 columns; the vocabulary matrix and the embeddings in int8 |
| `auto` | `int4` |

Except with `exact`, matrices that the checkpoint has quantized stay as stored. Activations between products are
float32. ONNX Runtime quantizes the inputs of integer matrices to int8, with a scale for each block (`accuracy_level` 4
of its `MatMulNBits`), which makes these products fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from transom.errors import OptionError, option

if TYPE_CHECKING:
    from transom.contract import Options

NAMES = ("auto", "exact", "f32", "f16", "int8", "int4")


@dataclass(frozen=True)
class OnnxPrecision:
    """A resolved `precision`."""

    number: Literal["float32", "float16"] = "float32"
    """Dtype of plain matrices, their products and the cache."""
    quantized: Literal["", "int8", "int4"] = ""
    """What plain matrices are quantized to; empty: they are not."""
    exact: bool = False
    """Whether quantized matrices are unpacked."""

    def describe(self, forms: Sequence[str]) -> str:
        """The text for a report.

        Args:
            forms: element types of the matrices as written.
        """
        names = " and ".join(sorted(set(forms), key=lambda form: (-forms.count(form), form)))
        inputs = ", int8 inputs of integer products" if any(form.startswith("int") for form in forms) else ""
        return f"{names} weights{inputs}, {self.number} cache, float32 between products"


def resolve(options: Options) -> OnnxPrecision:
    """The precision for these options.

    Raises:
        OptionError: the precision is unknown.
    """
    requested = str(options.get("precision") or "auto")
    if requested not in NAMES:
        raise OptionError(
            f"{option('precision', requested)} is unknown to portable ONNX decoders", f"It is one of {', '.join(NAMES)}"
        )
    if requested in ("exact", "f32"):
        return OnnxPrecision(exact=True)
    if requested == "f16":
        return OnnxPrecision("float16")
    return OnnxPrecision(quantized="int8" if requested == "int8" else "int4")
