"""In what numbers a network computes, by what was asked for, the card and the checkpoint.

| `precision` | What it means |
|---|---|
| `exact`, `f32` | float32 throughout, without TF32 and without fused attention; for checking, not for speed |
| `f16`, `bf16` | float16 or bfloat16 products and cache; `bf16` needs sm_80 |
| `fp8` | plain matrices in float8 (E4M3, a scale for each row), their inputs too (one scale each); sm_89 and newer |
| `fast` | as `fp8`, and attention in float8: for long prompts, see below |
| `int8` | plain matrices in int8, a scale for each row; their inputs are as they are |
| `int4` | plain matrices in int4, blocks of 32 columns; their inputs are as they are |
| `auto` | `fp8` where the card has it and the checkpoint has plain matrices; else as stored |

The vocabulary matrix is in int8 by rows wherever matrices are rounded: it is read once for each token, and on
SmolLM2-135M half of the divergence of `fp8` came from it.

4-bit blocks of a checkpoint are kept as they are stored, those with zero points or minimums too. 8-bit blocks are
rounded anew to int8 by rows: TensorRT unpacks a whole matrix in blocks before each product (tensorrt-rtx 1.7).

Scales for inputs come from the texts that the host gives; without any, `fp8` keeps the inputs as they are. What is not
rounded is float16, or bfloat16 for a checkpoint of bfloat16 on sm_80 and newer, and where the texts show numbers in
attention that come near the end of float16.

`fast` rounds the cache to float8 before each attention, since TensorRT keeps none in float8: a long prompt's products
gain by it, while each decoded token reads the cache and writes it once more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from transom.errors import OptionError, option
from transom.graph.weights import Blocked, Dense
from transom_tensorrt.probing import FLOAT8_SINCE

if TYPE_CHECKING:
    from transom.contract import Options
    from transom.graph.weights import Weight

ROUNDING = ("fast", "int8", "fp8", "int4")
"""Those that say what plain matrices are rounded to."""
NAMES = ("auto", "exact", "fast", "f32", "bf16", "f16", "int8", "fp8", "int4")
Number = Literal["float32", "bfloat16", "float16"]
Rounded = Literal["", "int8", "fp8", "int4"]
BFLOAT16_SINCE = 80


@dataclass(frozen=True)
class RtxPrecision:
    """A resolved choice."""

    number: Number
    """Of products, activations between them and the cache."""
    rounded: Rounded = ""
    """What plain matrices are rounded to; empty: nothing."""
    activations: bool = False
    """Whether inputs of rounded products are rounded, too."""
    attention: bool = False
    """Whether attention is in float8."""
    free: bool = False
    """Whether `number` was nobody's wish, so that it may become bfloat16 where float16 is too short."""

    def describe(self, matrices: Iterable[Weight]) -> str:
        """As a report has it."""
        stored = {"int4": "int4", "uint4": "int4", "float8e4m3fn": "fp8"}
        forms = {stored.get(w.dtype, "int8") for w in matrices if isinstance(w, Blocked)}
        if self.rounded:
            forms.add(self.rounded)
        weights = f"{' and '.join(sorted(forms))} weights, " if forms else ""
        inputs = "fp8 inputs of products, " if self.activations else ""
        attention = "fp8 attention, " if self.attention else ""
        return f"{weights}{inputs}{attention}{self.number} products and cache, float32 between them"


def resolve(options: Options, arch: int, matrices: Iterable[Weight], *, emulated: bool = False) -> RtxPrecision:
    """The precision for these options.

    Args:
        arch: 89 for sm_89.
        matrices: the weights of matrix products.
        emulated: in onnxruntime, which has float8 and lacks bfloat16.

    Raises:
        OptionError: the value is unknown, or this card or this checkpoint cannot have it.
    """
    asked = str(options.get("precision") or "auto")
    if asked not in NAMES:
        raise OptionError(f"{option('precision', asked)} is unknown", f"It is one of {', '.join(NAMES)}")
    known = list(matrices)
    plain = [w for w in known if isinstance(w, Dense)]
    """What is rounded, where anything is."""
    if asked in ("exact", "f32"):
        return RtxPrecision("float32")
    if asked == "bf16":
        if emulated:
            raise OptionError(
                "onnxruntime does not compute in bfloat16", f"Use {option('precision', 'f16')} or 'exact'"
            )
        if arch < BFLOAT16_SINCE:
            raise OptionError(
                f"{option('precision', 'bf16')} needs sm_80 or newer, and this is sm_{arch}",
                f"Use {option('precision', 'f16')}",
            )
        return RtxPrecision("bfloat16")
    if asked == "f16":
        return RtxPrecision("float16")
    float8 = emulated or arch >= FLOAT8_SINCE
    if asked in ("fp8", "fast") and not float8:
        raise OptionError(
            f"{option('precision', asked)} needs tensor cores for float8, of sm_89 or newer, and this is sm_{arch}",
            f"Use {option('precision', 'int8')} or 'int4', whose weights are as small or smaller",
        )
    wide = any(w.dtype == "bfloat16" for w in plain) and arch >= BFLOAT16_SINCE and not emulated
    number: Number = "bfloat16" if wide else "float16"
    if asked == "auto":
        asked = "fp8" if plain and float8 else ""
    wanted: Mapping[str, Rounded] = {"fp8": "fp8", "fast": "fp8", "int8": "int8", "int4": "int4"}
    rounded = wanted.get(asked, "") if plain else ""
    if rounded == "int4":
        uneven = next((w for w in plain if w.shape[-1] % 32), None)
        if uneven is not None:
            raise OptionError(
                f"{option('precision', 'int4')} rounds blocks of 32 columns, and a matrix has {uneven.shape[-1]}",
                f"Use {option('precision', 'int8')}",
            )
    inputs = rounded == "fp8" and bool(options.get("calibration"))
    if inputs:
        number = "float16"  # what is rounded to float8 goes through float32, and the texts show what attention needs
    return RtxPrecision(number, rounded, inputs, attention=asked == "fast" and inputs, free=True)
