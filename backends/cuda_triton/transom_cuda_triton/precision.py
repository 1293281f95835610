"""Compute precision, from the `precision` option, the card and the checkpoint.

| `precision` | Meaning |
|---|---|
| `exact`, `f32` | float32 weights, activations, cache and products (IEEE, no TF32); for checking, not for speed |
| `bf16` | bfloat16 activations and cache, products summed in float32; sm_80 and newer |
| `f16` | the same with float16 |
| `int8` | as `auto`, with unquantized matrices quantized to int8 in blocks |
| `fp8` | as `auto`, with unquantized matrices quantized to float8, see below; sm_89 and newer |
| `int4` | as `auto`, for a checkpoint with 4-bit blocks; refused if it has none |
| `auto`, `fast` | see below |

4-bit and 8-bit blocks are always kept as stored and unpacked inside the products. `auto` is float16 on sm_70 and for a
checkpoint stored in float16; otherwise bfloat16, whose range no model exceeds; and float32 in Triton's interpreter,
which computes bfloat16 wrongly.

`fp8` is E4M3 with a scale per row of a matrix. If a step has several tokens, their activations are quantized the same
way, with a scale per token, for the tensor cores; the activations of a single token are not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from transom.errors import OptionError, option

if TYPE_CHECKING:
    from transom.contract import Options
    from transom.graph.weights import Weight

NAMES = ("auto", "exact", "fast", "f32", "bf16", "f16", "int8", "fp8", "int4")
Number = Literal["fp32", "bf16", "fp16"]
"""Triton's name of a number format."""
QuantizedType = Literal["", "int8", "fp8"]
DIVERGENCES: dict[QuantizedType, float] = {"int8": 0.05, "fp8": 0.15}
"""Mean divergence from the reference, nats, by the type that plain matrices are quantized to.

Measured in Triton's interpreter, with float32 elsewhere, on random tiny models of every family: at most 0.001 with
int8, and 0.05 with fp8. These have no large columns. SmolLM2-135M measures 0.05 to 0.1 with weights and inputs of
products in E4M3 in another engine, so fp8 has room for that; int8 leaves the inputs as they are, and is held to what
exact claims are held to. No card has been measured.
"""
LONG: dict[str, str] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class TritonPrecision:
    """A resolved choice."""

    number: Number
    """Number format of activations and cache."""
    quantized: QuantizedType = ""
    """The type that unquantized matrices are quantized to; empty: they stay as stored."""

    def describe(self, matrices: Iterable[Weight]) -> str:
        """A description for a report."""
        from transom.graph.weights import Blocked

        forms = sorted({w.dtype.removeprefix("u") for w in matrices if isinstance(w, Blocked)})
        if self.quantized:
            forms = sorted({*forms, self.quantized})
        name = LONG[self.number]
        weights = f"{' and '.join(forms)} weights, " if forms else ""
        if self.quantized == "fp8":
            weights += "fp8 activations in products of several rows, other "
        return f"{weights}{name} activations and cache, float32 sums"


def resolve(options: Options, arch: int, matrices: Iterable[Weight], *, interpreted: bool = False) -> TritonPrecision:
    """The precision for these options.

    Args:
        arch: 80 for sm_80.
        matrices: the weights of matrix products.
        interpreted: whether kernels run in Triton's interpreter.

    Raises:
        OptionError: the value is unknown, or this card or checkpoint does not support it.
    """
    from transom.graph.weights import Blocked

    requested = str(options.get("precision") or "auto")
    if requested not in NAMES:
        raise OptionError(f"{option('precision', requested)} is unknown", f"It is one of {', '.join(NAMES)}")
    if requested in ("exact", "f32"):
        return TritonPrecision("fp32")
    if requested == "f16":
        return TritonPrecision("fp16")
    if requested == "bf16":
        if interpreted:
            raise OptionError(
                "Triton's interpreter computes bfloat16 wrongly", f"Use {option('precision', 'exact')} or 'f16'"
            )
        if arch < 80:
            raise OptionError(
                f"{option('precision', 'bf16')} needs sm_80 or newer, and this is sm_{arch}",
                f"Use {option('precision', 'f16')}",
            )
        return TritonPrecision("bf16")
    if requested == "fp8" and arch < 89 and not interpreted:
        raise OptionError(
            f"{option('precision', 'fp8')} needs the float8 tensor cores of sm_89 or newer, and this is sm_{arch}",
            f"Use {option('precision', 'int8')}",
        )
    known = list(matrices)
    if requested == "int4" and not any(isinstance(w, Blocked) and "int4" in w.dtype for w in known):
        raise OptionError(
            f"{option('precision', 'int4')} uses the stored 4-bit weights, and this checkpoint has none",
            f"Quantize it first, or use {option('precision', 'int8')}",
        )
    quantized: QuantizedType = "int8" if requested == "int8" else "fp8" if requested == "fp8" else ""
    return TritonPrecision(_number(arch, known, interpreted), quantized)


def _number(arch: int, matrices: list[Weight], interpreted: bool) -> Number:
    from transom.graph.weights import Blocked

    if interpreted:
        return "fp32"
    if arch < 80:
        return "fp16"
    plain = [w for w in matrices if not isinstance(w, Blocked)]
    half = sum(w.nbytes for w in plain if w.dtype == "float16")
    return "fp16" if plain and 2 * half > sum(w.nbytes for w in plain) else "bf16"
