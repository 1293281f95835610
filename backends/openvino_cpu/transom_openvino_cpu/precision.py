"""Compute precision: the meaning of `precision=` in this backend, and the choice of `auto` on each CPU.

The native library runs a decoder if it can, else OpenVINO does. The values mean the same in both, with small
differences:

| value | weights | activations and cache |
|---|---|---|
| `exact`, `f32` | as stored, blocks unpacked on the fly without loss | float32 |
| `bf16` | as stored | bfloat16 inputs of matrix products and cache, float32 in norms, rotary tables and the \
vocabulary matrix; native: float32 between operators |
| `f16` | as stored | float16; needs avx512_fp16 and OpenVINO |
| `fast`, `int8` | native: stored blocks, plain matrices quantized to int8 in groups of 64; OpenVINO: blocks with \
minimums are requantized too | int8 inputs of matrix products, quantized on the fly in groups of 32 or less (OpenVINO: \
64 or less); native: int8 in the cache and in both products of attention, with a scale per token and head; OpenVINO: \
bfloat16 cache (float32 without bf16 hardware) |
| `int4` | the stored 4-bit blocks; refused if the checkpoint has none | as `bf16` |
| `auto` | see below | |

`auto` runs a graph that is not a decoder in float32. For a decoder it depends on the CPU's features:

- AVX-512 VNNI or AVX-VNNI, quantized checkpoint: as `fast`. The native library takes the mean of keys off an int8 cache
  (`native.key_means`). For `auto` it also measures on calibration texts what int8 costs (`native.mixed_precision`).
  Kinds of products that cost too much, and the cache, become bfloat16 (products float32 without bf16 hardware). With
  AMX all products are bfloat16, for `fast` too, because they are faster than int8 there; blocks are rounded to it;
- bf16 hardware (avx512_bf16, amx_bf16), checkpoint in float32, float16 or bfloat16: as `bf16`;
- otherwise: as `exact`.

The vocabulary matrix is never requantized. `benchmarks/cpu_fidelity.py` measures the loss of accuracy of `auto`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeGuard

from transom.errors import OptionError, option

if TYPE_CHECKING:
    from transom.contract import Device, Options
    from transom.graph.weights import Blocked, Weight

Hint = Literal["f32", "bf16", "f16"]

GROUP = 64
"""Columns that share a scale when a matrix is quantized to int8."""
NAMES = ("auto", "exact", "fast", "f32", "bf16", "f16", "int8", "int4")
DIVERGENCES = {"llama": 0.1, "mistral": 0.1, "gemma3": 0.2, "qwen2": 0.2, "onnx": 0.2}
"""Mean divergence from the reference with int8 products and cache, nats, by family; others declare none.

On the check prompt, 4-bit files measure 0.005 (SmolLM2-135M, a Llama), 0.003 (Gemma 3 270M) and 0.001 (Qwen2.5-Coder
0.5B) natively. OpenVINO has wider groups, and `transom verify` finds 0.016 and 0.043 for the first two. The rest is
room for larger models. Mistral is computed as Llama is, and its GGUF files are of that family. An ONNX file may hold
any family.

Gemma 2, Phi-3 and Qwen3 were measured on random tiny models alone. These have no large columns, and measure less than
0.004 in every family; so they show that the arithmetic is right, and not what a real model loses.
"""
_BF16 = frozenset({"avx512_bf16", "amx_bf16"})
_VNNI = frozenset({"avx512_vnni", "avx_vnni"})


@dataclass(frozen=True)
class CpuPrecision:
    """A resolved choice."""

    name: str
    """`"exact"`, `"bf16"`, `"f16"`, `"int8"` or `"int4"`."""
    hint: Hint
    """Number format between operators and in the cache."""
    dynamic: bool
    """Matrix products take int8 activations, quantized on the fly."""
    dense_to_int8: bool = False
    """Matrices stored unquantized are quantized to int8, too."""

    def divergence(self, family: str) -> float | None:
        """What the self-check may find with int8 products, nats; None without them or where it was not measured."""
        return DIVERGENCES.get(family) if self.dynamic else None

    @property
    def mixes(self) -> bool:
        """Whether the native library may keep some products, and the cache, wider than int8: `auto` measures which."""
        return self.dynamic and not self.dense_to_int8

    @property
    def wide(self) -> Literal["bf16", "f32"]:
        """The format of products that `mixes` keeps wider than int8."""
        return "bf16" if self.hint == "bf16" else "f32"

    @property
    def cache(self) -> str:
        """Number format of the native library's cache: one of `native.program.CACHES`."""
        return "int8" if self.dynamic else self.hint

    def describe_cache(self) -> str:
        """The number format of the native library's cache, for a report."""
        return {"f32": "float32", "bf16": "bfloat16", "int8": "int8"}[self.cache]

    def describe(self) -> str:
        """OpenVINO's compute precision, for a report."""
        wide = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}[self.hint]
        if self.dynamic:
            return f"int8 matrix products, {wide} elsewhere, {wide} cache"
        return f"{wide}, {wide} cache"


def resolve(options: Options, device: Device, matrices: Iterable[Weight], *, decoder: bool) -> CpuPrecision:
    """The precision for these options on this device.

    Args:
        matrices: the weights of matrix products.

    Raises:
        OptionError: the value is unknown, or this CPU or checkpoint does not support it.
    """
    requested = str(options.get("precision") or "auto")
    if requested not in NAMES:
        raise OptionError(f"{option('precision', requested)} is unknown", f"It is one of {', '.join(NAMES)}")
    wide: Hint = "bf16" if device.features & _BF16 else "f32"
    if requested == "auto":
        if not decoder:
            return CpuPrecision("exact", "f32", False)
        stored = _stored(matrices)
        if stored["blocked"] > stored["dense"]:
            return CpuPrecision("int8", wide, True) if device.features & _VNNI else CpuPrecision("exact", "f32", False)
        return CpuPrecision("bf16", "bf16", False) if wide == "bf16" else CpuPrecision("exact", "f32", False)
    if requested in ("exact", "f32"):
        return CpuPrecision("exact", "f32", False)
    if requested == "bf16":
        if wide != "bf16":
            raise OptionError(
                f"{option('precision', 'bf16')} needs a CPU with avx512_bf16 or amx_bf16, which this one lacks",
                f"Use {option('precision', 'exact')} or 'fast'",
            )
        return CpuPrecision("bf16", "bf16", False)
    if requested == "f16":
        if "avx512_fp16" not in device.features:
            raise OptionError(
                f"{option('precision', 'f16')} needs a CPU with avx512_fp16, which this one lacks",
                f"Use {option('precision', 'auto')}",
            )
        return CpuPrecision("f16", "f16", False)
    if requested == "int4":
        stored = _stored(matrices)
        if not stored["4-bit"]:
            raise OptionError(
                f"{option('precision', 'int4')} uses the stored 4-bit weights, and this checkpoint has none",
                f"Quantize it first, or use {option('precision', 'int8')}",
            )
        return CpuPrecision("int4", wide, False)
    return CpuPrecision("int8", wide, True, dense_to_int8=True)


def _stored(matrices: Iterable[Weight]) -> Counter[str]:
    """Number of elements by form: `dense`, `blocked`, and `4-bit` among the blocked ones."""
    count: Counter[str] = Counter()
    for weight in matrices:
        elements = weight.shape[0] * weight.shape[-1]
        if _in_integers(weight):
            count["blocked"] += elements
            count["4-bit"] += elements * (weight.dtype in ("int4", "uint4"))
        else:
            count["dense"] += elements
    return count


def _in_integers(weight: Weight) -> TypeGuard[Blocked]:
    """Whether it is in blocks of integers. 8-bit floats are widened before products, like a plain matrix."""
    from transom.graph.weights import Blocked

    return isinstance(weight, Blocked) and "int" in weight.dtype


@dataclass(frozen=True)
class ProductForm:
    """How one matrix is stored."""

    kind: Literal["stored", "int8"]
    group: int
    """Columns that share a scale; 0: there are no scales."""


def form_of(weight: Weight, precision: CpuPrecision) -> ProductForm:
    """How the matrix of a product is stored for a precision: without loss where possible."""
    from transom.graph.weights import Blocked

    stored = ProductForm("stored", weight.block if isinstance(weight, Blocked) else 0)
    if not precision.dynamic:
        return stored
    if _in_integers(weight):
        # Integer blocks are multiplied as stored, unless they have minimums or are small.
        if not weight.has_minimums and weight.block >= 32:
            return stored
    elif not precision.dense_to_int8 or len(weight.shape) != 2:
        return stored
    columns = weight.shape[1]
    return ProductForm("int8", GROUP if columns % GROUP == 0 else 32 if columns % 32 == 0 else columns)


def dynamic_group(forms: Iterable[tuple[Weight, ProductForm]]) -> int:
    """The group size for quantizing activations: one for the whole model, the size that most of its weights have.

    The engine silently skips matrices with smaller groups, so of two nearly equally frequent sizes the smaller is used.
    """
    count: Counter[int] = Counter()
    for weight, form in forms:
        if form.group >= 32:
            count[min(form.group, 128) // 32 * 32] += weight.shape[0] * weight.shape[-1]
    if not count:
        return 0
    large = max(count.values())
    return min(group for group, elements in count.items() if elements * 4 >= large)
