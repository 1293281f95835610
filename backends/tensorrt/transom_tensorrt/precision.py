"""The compute precision of a network, from the option `precision`, the card and the checkpoint.

| `precision` | Meaning |
|---|---|
| `exact`, `f32` | float32 throughout, without TF32 and without fused attention; for checking, not for speed |
| `f16`, `bf16` | float16 or bfloat16 products and cache; `bf16` needs sm_80 |
| `fp8` | plain matrices in float8 (E4M3, a scale for each row), and their inputs (one scale each); sm_89 and newer |
| `fast` | as `fp8`, and attention in float8: for long prompts, see below |
| `int8` | plain matrices in int8, a scale for each row; inputs unchanged |
| `int4` | plain matrices in int4, blocks of 32 columns; inputs unchanged |
| `auto` | `fp8` if the card supports it and the checkpoint has plain matrices; otherwise as stored |

The vocabulary matrix becomes int8 by rows whenever matrices are quantized: it is read once for each token, and on
SmolLM2-135M it caused half of the divergence of `fp8`.

4-bit blocks of a checkpoint are kept as stored, including those with zero points or minimums. 8-bit blocks are
requantized to int8 by rows: TensorRT unpacks a whole block-quantized matrix before each product (tensorrt-rtx 1.7).

Scales for inputs come from the host's calibration texts; without any, `fp8` leaves inputs unchanged. Everything that is
not quantized is float16. It is bfloat16 for a bfloat16 checkpoint on sm_80 and newer, and if the calibration texts
show values in attention close to float16's limit.

`fast` quantizes the cache to float8 before each attention, since TensorRT cannot store it in float8: long prompts get
faster products, but each decoded token reads and writes the cache once more.
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

QUANTIZING = ("fast", "int8", "fp8", "int4")
"""Values of `precision` that name what plain matrices are quantized to."""
NAMES = ("auto", "exact", "fast", "f32", "bf16", "f16", "int8", "fp8", "int4")
Number = Literal["float32", "bfloat16", "float16"]
QuantizedType = Literal["", "int8", "fp8", "int4"]
BFLOAT16_SINCE = 80


@dataclass(frozen=True)
class RtxPrecision:
    """A resolved `precision`."""

    number: Number
    """Dtype of products, their activations and the cache."""
    quantized: QuantizedType = ""
    """What plain matrices are quantized to; empty: they are not."""
    activations: bool = False
    """Whether inputs of quantized products are quantized, too."""
    attention: bool = False
    """Whether attention is in float8."""
    free: bool = False
    """Whether `number` was not requested, so that it may become bfloat16 if float16's range is too small."""

    def describe(self, matrices: Iterable[Weight]) -> str:
        """The text for a report."""
        stored = {"int4": "int4", "uint4": "int4", "float8e4m3fn": "fp8"}
        forms = {stored.get(w.dtype, "int8") for w in matrices if isinstance(w, Blocked)}
        if self.quantized:
            forms.add(self.quantized)
        weights = f"{' and '.join(sorted(forms))} weights, " if forms else ""
        inputs = "fp8 inputs of products, " if self.activations else ""
        attention = "fp8 attention, " if self.attention else ""
        return f"{weights}{inputs}{attention}{self.number} products and cache, float32 between them"


def resolve(options: Options, arch: int, matrices: Iterable[Weight], *, emulated: bool = False) -> RtxPrecision:
    """The precision for these options.

    Args:
        arch: 89 for sm_89.
        matrices: the weights of matrix products.
        emulated: whether it runs in onnxruntime, which has float8 and lacks bfloat16.

    Raises:
        OptionError: the value is unknown, or this card or this checkpoint does not support it.
    """
    requested = str(options.get("precision") or "auto")
    if requested not in NAMES:
        raise OptionError(f"{option('precision', requested)} is unknown", f"It is one of {', '.join(NAMES)}")
    known = list(matrices)
    plain = [w for w in known if isinstance(w, Dense)]
    """The matrices to quantize, if any are."""
    if requested in ("exact", "f32"):
        return RtxPrecision("float32")
    if requested == "bf16":
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
    if requested == "f16":
        return RtxPrecision("float16")
    float8 = emulated or arch >= FLOAT8_SINCE
    if requested in ("fp8", "fast") and not float8:
        raise OptionError(
            f"{option('precision', requested)} needs tensor cores for float8, of sm_89 or newer, and this is sm_{arch}",
            f"Use {option('precision', 'int8')} or 'int4', whose weights are as small or smaller",
        )
    wide = any(w.dtype == "bfloat16" for w in plain) and arch >= BFLOAT16_SINCE and not emulated
    number: Number = "bfloat16" if wide else "float16"
    if requested == "auto":
        requested = "fp8" if plain and float8 else ""
    wanted: Mapping[str, QuantizedType] = {"fp8": "fp8", "fast": "fp8", "int8": "int8", "int4": "int4"}
    quantized = wanted.get(requested, "") if plain else ""
    if quantized == "int4":
        uneven = next((w for w in plain if w.shape[-1] % 32), None)
        if uneven is not None:
            raise OptionError(
                f"{option('precision', 'int4')} quantizes blocks of 32 columns, and a matrix has {uneven.shape[-1]}",
                f"Use {option('precision', 'int8')}",
            )
    inputs = quantized == "fp8" and bool(options.get("calibration"))
    if inputs:
        number = "float16"  # results of float8 products are float32, and the texts show what attention needs
    return RtxPrecision(number, quantized, inputs, attention=requested == "fast" and inputs, free=True)
