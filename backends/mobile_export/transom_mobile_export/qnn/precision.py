"""The compute precision on the HTP, from the option `precision`.

| `precision` | Weights | Activations | Cache |
|---|---|---|---|
| `int8`, `auto` | int8, a scale for each row | uint16 | uint8 |
| `int4` | int4, a scale for each block of 32 columns; small and vocabulary matrices as in `int8` | uint16 | uint8 |
| `f16` | float16 | float16 | float16 |

The hidden state that runs through all layers, and its sums, are float16 in all of them; see `encoding`.

All weights are symmetric: with a zero point in 4-bit weights the HTP silently computes wrong results.

Before v73 the HTP has no products of two 16-bit activations, which attention consists of. Its compiler accepts them,
but the logits are wrong in all positions except the first (onnxruntime-qnn 2.7). There `auto` is `f16`, and the other
values are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from transom.errors import OptionError, option

if TYPE_CHECKING:
    from transom.contract import Options
    from transom.programs.reading import Op

NAMES = ("auto", "f16", "int8", "int4")
BLOCK = 32
"""Columns that share a scale in the 4-bit form."""
Form = Literal["float16", "int8", "int4"]
CacheNumber = Literal["uint8", "uint16", "float16", "float32"]


@dataclass(frozen=True)
class QnnPrecision:
    """A resolved `precision`."""

    weights: Form
    cache: CacheNumber

    @property
    def quantized(self) -> bool:
        """Whether activations are quantized, which needs texts to observe their ranges."""
        return self.weights != "float16"

    def weights_of(self, op: Op) -> Form:
        """The form of one product's matrix: with `int4`, the vocabulary matrix and small matrices are int8."""
        return "int8" if self.weights == "int4" and op.by in (HEAD, SMALL) else self.weights

    def describe(self) -> str:
        """The text for a report."""
        if not self.quantized:
            return "float16 weights, activations and cache"
        weights = "int8 weights"
        if self.weights == "int4":
            weights = f"int4 weights in blocks of {BLOCK}, int8 for small matrices and the vocabulary"
        return f"{weights}, uint16 activations, float16 hidden state, {self.cache} cache"


HEAD = "head"
"""`Op.by` of the product with the vocabulary matrix."""
SMALL = "small"
"""`Op.by` of a product whose matrix is small compared with the others."""
SMALL_SHARE = 1 / 16
"""Largest share of a layer's weights that a small matrix has. On SmolLM2-135M the divergence of `int4` falls by a third
with keys and values in int8, which are 6 % of the weights."""


QUANTIZED_SINCE = 73
"""The first Hexagon version that computes attention correctly with quantized activations."""


def resolve(options: Options, htp_arch: int) -> QnnPrecision:
    """The precision for these options.

    Args:
        htp_arch: 73 for Hexagon v73.

    Raises:
        OptionError: the value is unknown, or the HTP does not support it.
    """
    requested = str(options.get("precision") or "auto")
    if requested not in NAMES:
        raise OptionError(
            f"{option('precision', requested)} is not a precision of the HTP", f"It is one of {', '.join(NAMES)}"
        )
    quantized = htp_arch >= QUANTIZED_SINCE
    if requested in ("int8", "int4") and not quantized:
        raise OptionError(
            f"{option('precision', requested)} has attention in 16-bit activations, which Hexagon v{htp_arch} silently "
            "computes wrongly",
            f"Use {option('precision', 'f16')}, or a target with Hexagon v73 or newer",
        )
    if requested == "f16" or not quantized:
        return QnnPrecision("float16", "float16")
    return QnnPrecision("int4" if requested == "int4" else "int8", "uint8")
