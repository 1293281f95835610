"""In what numbers a model runs: what `precision=` means here, what `auto` takes on which CPU, and what it costs.

A decoder runs by the native library, or where that cannot be had by OpenVINO. The names mean the same, with small
differences inside:

| value | weights | activations and cache |
|---|---|---|
| `exact`, `f32` | as stored, blocks unpacked on the fly without loss | float32 |
| `bf16` | as stored | bfloat16 into matrix products and in the cache, float32 inside norms, rotary tables and the \
vocabulary matrix; natively float32 between operators |
| `f16` | as stored | float16; needs avx512_fp16, and OpenVINO |
| `fast`, `int8` | natively the stored blocks, plain matrices rounded to int8 in groups of 64; through OpenVINO blocks \
with minimums are rounded too | int8 into matrix products, rounded on the fly in groups of 64 or less; natively int8 \
in the cache and in both products of attention, with a scale for each token and head; through OpenVINO a bfloat16 \
cache (float32 without bf16 hardware) |
| `int4` | the stored 4-bit blocks; refused where the checkpoint has none | as `bf16` |
| `auto` | see below | |

`auto` runs a graph that is no decoder in float32. For a decoder it takes, by the CPU's features:

- AVX-512 VNNI or AVX-VNNI, quantised checkpoint: as `fast`;
- bf16 hardware (avx512_bf16, amx_bf16), checkpoint in float32, float16 or bfloat16: as `bf16`;
- else: as `exact`.

The vocabulary matrix is never requantised. What `auto` costs is measured by `benchmarks/cpu_fidelity.py`.
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
"""Columns that share a scale when a matrix is requantised to int8."""
NAMES = ("auto", "exact", "fast", "f32", "bf16", "f16", "int8", "int4")
_BF16 = frozenset({"avx512_bf16", "amx_bf16"})
_VNNI = frozenset({"avx512_vnni", "avx_vnni"})


@dataclass(frozen=True)
class CpuPrecision:
    """A resolved choice."""

    name: str
    """`"exact"`, `"bf16"`, `"f16"`, `"int8"` or `"int4"`."""
    hint: Hint
    """Numbers between operators and in the cache."""
    dynamic: bool
    """Matrix products take int8 activations, quantised on the fly."""
    dense_to_int8: bool = False
    """Matrices that are not quantised are, too."""

    @property
    def cache(self) -> str:
        """In what numbers the native library keeps keys and values: one of `native.program.CACHES`."""
        return "int8" if self.dynamic else self.hint

    def describe_cache(self) -> str:
        """The native library's, as a report has it."""
        return {"f32": "float32", "bf16": "bfloat16", "int8": "int8"}[self.cache]

    def describe(self) -> str:
        """What OpenVINO computes in, as a report has it."""
        wide = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}[self.hint]
        if self.dynamic:
            return f"int8 matrix products, {wide} elsewhere, {wide} cache"
        return f"{wide}, {wide} cache"


def resolve(options: Options, device: Device, matrices: Iterable[Weight], *, decoder: bool) -> CpuPrecision:
    """The precision for these options on this device.

    Args:
        matrices: the weights of matrix products.

    Raises:
        OptionError: the value is unknown, or this CPU or this checkpoint cannot have it.
    """
    asked = str(options.get("precision") or "auto")
    if asked not in NAMES:
        raise OptionError(f"{option('precision', asked)} is unknown", f"It is one of {', '.join(NAMES)}")
    wide: Hint = "bf16" if device.features & _BF16 else "f32"
    if asked == "auto":
        if not decoder:
            return CpuPrecision("exact", "f32", False)
        stored = _stored(matrices)
        if stored["blocked"] > stored["dense"]:
            return CpuPrecision("int8", wide, True) if device.features & _VNNI else CpuPrecision("exact", "f32", False)
        return CpuPrecision("bf16", "bf16", False) if wide == "bf16" else CpuPrecision("exact", "f32", False)
    if asked in ("exact", "f32"):
        return CpuPrecision("exact", "f32", False)
    if asked == "bf16":
        if wide != "bf16":
            raise OptionError(
                f"{option('precision', 'bf16')} needs a CPU with avx512_bf16 or amx_bf16, which this one lacks",
                f"Use {option('precision', 'exact')} or 'fast'",
            )
        return CpuPrecision("bf16", "bf16", False)
    if asked == "f16":
        if "avx512_fp16" not in device.features:
            raise OptionError(
                f"{option('precision', 'f16')} needs a CPU with avx512_fp16, which this one lacks",
                f"Use {option('precision', 'auto')}",
            )
        return CpuPrecision("f16", "f16", False)
    if asked == "int4":
        stored = _stored(matrices)
        if not stored["4-bit"]:
            raise OptionError(
                f"{option('precision', 'int4')} keeps 4-bit weights as they are, and this checkpoint has none",
                f"Quantise it first, or use {option('precision', 'int8')}",
            )
        return CpuPrecision("int4", wide, False)
    return CpuPrecision("int8", wide, True, dense_to_int8=True)


def _stored(matrices: Iterable[Weight]) -> Counter[str]:
    """Elements by form: `dense`, `blocked`, and of these `4-bit`."""
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
    """Whether it is in blocks of integers. 8-bit floats are multiplied as wide ones, like a plain matrix."""
    from transom.graph.weights import Blocked

    return isinstance(weight, Blocked) and "int" in weight.dtype


@dataclass(frozen=True)
class ProductForm:
    """How one matrix is kept."""

    kind: Literal["stored", "int8"]
    group: int
    """Columns that share a scale; 0: none do."""


def form_of(weight: Weight, precision: CpuPrecision) -> ProductForm:
    """How the matrix of a product is kept, so that what the precision promises comes true without loss where it can."""
    from transom.graph.weights import Blocked

    stored = ProductForm("stored", weight.block if isinstance(weight, Blocked) else 0)
    if not precision.dynamic:
        return stored
    if _in_integers(weight):
        # Integer blocks are multiplied as they are; minimums and small blocks cannot be.
        if not weight.has_minimums and weight.block >= 32:
            return stored
    elif not precision.dense_to_int8 or len(weight.shape) != 2:
        return stored
    columns = weight.shape[1]
    return ProductForm("int8", GROUP if columns % GROUP == 0 else 32 if columns % 32 == 0 else columns)


def dynamic_group(forms: Iterable[tuple[Weight, ProductForm]]) -> int:
    """The group in which activations are quantised: one for the whole model, that of most of its numbers.

    The engine silently leaves it out for matrices with smaller groups, so the smaller of two near-equals is taken.
    """
    count: Counter[int] = Counter()
    for weight, form in forms:
        if form.group >= 32:
            count[min(form.group, 128) // 32 * 32] += weight.shape[0] * weight.shape[-1]
    if not count:
        return 0
    large = max(count.values())
    return min(group for group, elements in count.items() if elements * 4 >= large)
