"""In what numbers the HTP computes, by what was asked for.

| `precision` | Weights | Activations | Cache |
|---|---|---|---|
| `int8`, `auto` | int8, a scale for each row | uint16 | uint8 |
| `int4` | int4, a scale for each block of 32 columns; small and vocabulary matrices as in `int8` | uint16 | uint8 |
| `f16` | float16 | float16 | float16 |

The hidden state that runs through all layers, and its sums, are float16 in all of them; see `encoding`.

All weights are symmetric: for 4-bit weights with a zero point the HTP computes wrong numbers and says nothing.

Before v73 the HTP has no products of two 16-bit activations, which attention is made of: its compiler takes them, and
the logits are wrong in all positions but the first (onnxruntime-qnn 2.7). There `auto` is `f16`, and the others are
refused.
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
    """A resolved choice."""

    weights: Form
    cache: CacheNumber

    @property
    def rounded(self) -> bool:
        """Whether activations are rounded, which takes texts to see them on."""
        return self.weights != "float16"

    def weights_of(self, op: Op) -> Form:
        """Of one product: the vocabulary matrix and small ones are in int8 where others are in int4."""
        return "int8" if self.weights == "int4" and op.by in (HEAD, SMALL) else self.weights

    def describe(self) -> str:
        """As a report has it."""
        if not self.rounded:
            return "float16 weights, activations and cache"
        weights = "int8 weights"
        if self.weights == "int4":
            weights = f"int4 weights in blocks of {BLOCK}, int8 for small matrices and the vocabulary"
        return f"{weights}, uint16 activations, float16 hidden state, {self.cache} cache"


HEAD = "head"
"""`Op.by` of the product with the vocabulary matrix."""
SMALL = "small"
"""`Op.by` of a product whose matrix is small beside the others."""
SMALL_SHARE = 1 / 16
"""Of the weights of a layer, that a small matrix has at most. On SmolLM2-135M the divergence of `int4` falls by a third
with keys and values in int8, which are 6 % of the weights."""


ROUNDED_SINCE = 73
"""The Hexagon version from which on attention is right with rounded activations."""


def resolve(options: Options, htp_arch: int) -> QnnPrecision:
    """The precision for these options.

    Args:
        htp_arch: 73 for Hexagon v73.

    Raises:
        OptionError: the value is unknown, or the HTP does not have it.
    """
    asked = str(options.get("precision") or "auto")
    if asked not in NAMES:
        raise OptionError(
            f"{option('precision', asked)} is none that the HTP computes in", f"It is one of {', '.join(NAMES)}"
        )
    rounded = htp_arch >= ROUNDED_SINCE
    if asked in ("int8", "int4") and not rounded:
        raise OptionError(
            f"{option('precision', asked)} has attention in 16-bit activations, and Hexagon v{htp_arch} computes that "
            "wrong without a word",
            f"Use {option('precision', 'f16')}, or a target with Hexagon v73 or newer",
        )
    if asked == "f16" or not rounded:
        return QnnPrecision("float16", "float16")
    return QnnPrecision("int4" if asked == "int4" else "int8", "uint8")
