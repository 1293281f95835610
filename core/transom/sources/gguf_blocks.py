"""GGUF's tensor types as weights: blocks stay blocks, number for number, where `Blocked` can represent them.

| types | quants | block | scales | offset |
|---|---|---|---|---|
| Q4_0 | int4 | 32 | float16 | |
| Q4_1 | uint4 | 32 | float16 | minimums |
| Q5_0, Q8_0, IQ4_NL | int8 | 32 | float16 | |
| Q5_1 | uint8 | 32 | float16 | minimums |
| MXFP4 | int8: the value doubled | 32 | float32: half of 2^e | |
| Q2_K | uint4 | 16 | float32: d·s | minimums -dmin·m |
| Q3_K | int4 | 16 | float32: d·s | |
| Q4_K | uint4 | 32 | float32: d·s | minimums -dmin·m |
| Q5_K | uint8 | 32 | float32: d·s | minimums -dmin·m |
| Q6_K | int8 | 16 | float32: d·s | |
| IQ4_XS | int8 | 32 | float32: d·s | |

The K-quants (and IQ4_XS) have two levels of scales: a float16 for 256 numbers and a small integer for each 16 or 32.
Their product is folded into one scale in float32, because float16 would round it; both levels are kept beside it, for
backends that can use them. So every type in the table equals
`gguf.quants.dequantize` bit for bit. Other types are dequantized by that function, with a note in the report.

Layouts: `ggml-common.h` and `ggml-quants.c` of https://github.com/ggml-org/ggml.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np

from transom.errors import SourceError
from transom.graph.weights import Array, Blocked, BlockedArrays, Dense, ScaleLevels, Weight
from transom.sources.finite import require_finite
from transom.sources.gguf_file import GgufTensor

_FLOATS: dict[str, tuple[Literal["float32", "float16", "bfloat16"], np.dtype[np.generic]]] = {
    "F32": ("float32", np.dtype(np.float32)),
    "F16": ("float16", np.dtype(np.float16)),
    "BF16": ("bfloat16", np.dtype(ml_dtypes.bfloat16)),
}
_KVALUES_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
_KVALUES_MXFP4 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)

Decode = Callable[[Array], BlockedArrays]
"""uint8 [blocks, bytes of a block] -> quants [blocks, numbers], scales and minimums [blocks, numbers / block]."""


@dataclass(frozen=True)
class BlockType:
    """How one GGUF type is represented as `Blocked`."""

    dtype: Literal["int4", "uint4", "int8", "uint8"]
    block: int
    scale_dtype: Literal["float16", "float32"]
    bytes: int
    numbers: int
    """Numbers in `bytes` bytes: 32, or 256 for a K-quant."""
    decode: Decode
    minimums: bool = False
    outer: int = 0
    """Numbers that share the outer one of two levels of scales; 0: one level."""


def weight_of(tensor: GgufTensor, where: object) -> tuple[Weight, str]:
    """A tensor of a GGUF file as a weight, with a note for the report; empty: nothing changed.

    Raises:
        SourceError: a type that holds no weights, or that neither Transom nor the gguf package can read.
    """
    if tensor.type in _FLOATS:
        name, dtype = _FLOATS[tensor.type]
        return Dense(tensor.shape, name, _dense_loader(tensor, dtype, where)), ""
    kind = BLOCK_TYPES.get(tensor.type)
    if kind is not None and len(tensor.shape) == 2:
        return _blocked(tensor, kind, where), ""
    return Dense(tensor.shape, "float32", _dequantizer(tensor, where)), "dequantized to float32"


def _dense_loader(tensor: GgufTensor, dtype: np.dtype[np.generic], where: object) -> Callable[[], Array]:
    checked = False

    def load() -> Array:
        nonlocal checked
        array = tensor.data.view(dtype).reshape(tensor.shape)
        if not checked:
            require_finite(array, tensor.name, where)
            checked = True
        return array

    return load


def _blocked(tensor: GgufTensor, kind: BlockType, where: object) -> Blocked:
    rows, columns = tensor.shape
    checked = False

    def load() -> BlockedArrays:
        nonlocal checked
        quants, scales, minimums, _, levels = kind.decode(tensor.data.reshape(-1, kind.bytes))
        if not checked:
            require_finite(scales, tensor.name, where, " among its scales")
            if minimums is not None:
                require_finite(minimums, tensor.name, where, " among its minimums")
            checked = True

        def by_rows(part: Array | None) -> Any:
            return None if part is None else part.reshape(rows, -1)

        both = levels and ScaleLevels(*map(by_rows, levels))
        return BlockedArrays(by_rows(quants), by_rows(scales), by_rows(minimums), None, both)

    return Blocked((rows, columns), kind.block, kind.dtype, kind.scale_dtype, load, kind.minimums, outer=kind.outer)


def _dequantizer(tensor: GgufTensor, where: object) -> Callable[[], Array]:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType[tensor.type]
    block, block_bytes = GGML_QUANT_SIZES[kind]
    unreadable = SourceError(
        f"The tensor {tensor.name} in {where} is of the type {tensor.type}, which has no weights that Transom or the "
        "gguf package can read",
        "Get the model in a common type such as Q4_K_M or Q8_0",
    )
    if tensor.type.startswith(("I8", "I16", "I32", "I64")):
        raise unreadable
    try:
        dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError:
        raise unreadable from None
    rows_bytes = tensor.shape[-1] // block * block_bytes

    def load() -> Array:
        with np.errstate(all="ignore"):  # scales that are not finite are reported below
            array = np.asarray(dequantize(tensor.data.reshape(-1, rows_bytes), kind), np.float32)
        return require_finite(array.reshape(tensor.shape), tensor.name, where)

    return load


# ------------------------------------------------------------------------------------------------ pieces of the layouts


def _float16(raw: Array, at: int) -> Array:
    """The float16 at byte `at` of each block, [blocks]."""
    return np.ascontiguousarray(raw[:, at : at + 2]).view(np.float16).reshape(-1)


def _nibbles(packed: Array, width: int) -> Array:
    """uint8 [blocks, n] -> [blocks, 2n]: for each run of `width` bytes, first the low nibbles, then the high ones."""
    blocks = packed.shape[0]
    runs = packed.reshape(blocks, -1, width)
    out = np.empty((blocks, runs.shape[1], 2, width), np.uint8)
    np.bitwise_and(runs, np.uint8(15), out=out[:, :, 0])
    np.right_shift(runs, np.uint8(4), out=out[:, :, 1])
    return out.reshape(blocks, -1)


def _fields(packed: Array, bits: int, width: int) -> Array:
    """uint8 [blocks, n] -> [blocks, n * 8 / bits]: for each run of `width` bytes, the lowest `bits` first."""
    blocks, count = packed.shape[0], 8 // bits
    runs = packed.reshape(blocks, -1, width)
    out = np.empty((blocks, runs.shape[1], count, width), np.uint8)
    for i in range(count):
        np.right_shift(runs, np.uint8(i * bits), out=out[:, :, i])
    out &= np.uint8((1 << bits) - 1)
    return out.reshape(blocks, -1)


def _fifth_bits(raw: Array, at: int) -> Array:
    """The 32 bits at byte `at`, one for each number, shifted to the fifth bit: uint8 [blocks, 32]."""
    bits = np.unpackbits(raw[:, at : at + 4], axis=1, bitorder="little")
    return np.left_shift(bits, np.uint8(4), out=bits)


def _q4_0(raw: Array) -> BlockedArrays:
    return BlockedArrays((_nibbles(raw[:, 2:], 16) - np.uint8(8)).view(np.int8), _float16(raw, 0))


def _q4_1(raw: Array) -> BlockedArrays:
    return BlockedArrays(_nibbles(raw[:, 4:], 16), _float16(raw, 0), _float16(raw, 2))


def _q5_0(raw: Array) -> BlockedArrays:
    quants = _nibbles(raw[:, 6:], 16) | _fifth_bits(raw, 2)
    return BlockedArrays((quants - np.uint8(16)).view(np.int8), _float16(raw, 0))


def _q5_1(raw: Array) -> BlockedArrays:
    return BlockedArrays(_nibbles(raw[:, 8:], 16) | _fifth_bits(raw, 4), _float16(raw, 0), _float16(raw, 2))


def _q8_0(raw: Array) -> BlockedArrays:
    return BlockedArrays(np.ascontiguousarray(raw[:, 2:]).view(np.int8), _float16(raw, 0))


def _iq4_nl(raw: Array) -> BlockedArrays:
    return BlockedArrays(_KVALUES_IQ4[_nibbles(raw[:, 2:], 16)], _float16(raw, 0))


def _mxfp4(raw: Array) -> BlockedArrays:
    exponents = raw[:, 0].astype(np.uint32)
    half = np.where(exponents < 2, np.uint32(0x00200000) << exponents, (exponents - np.uint32(1)) << np.uint32(23))
    return BlockedArrays(_KVALUES_MXFP4[_nibbles(raw[:, 1:], 16)], half.view(np.float32))


def _six_bit_scales(packed: Array) -> tuple[Array, Array]:
    """The 12 bytes of Q4_K and Q5_K: eight scales and eight minimums of 6 bits, each [blocks, 8]."""
    low, middle, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([low & 63, (high & 15) | ((low >> 2) & 48)], axis=1)
    minimums = np.concatenate([middle & 63, (high >> 4) | ((middle >> 2) & 48)], axis=1)
    return scales, minimums


def _two_levels(
    quants: Array, d: Array, codes: Array, least: Array | None = None, least_codes: Array | None = None
) -> BlockedArrays:
    """Blocks whose scales are d * s, and whose minimums are -least * m.

    Args:
        d, least: float16 [blocks].
        codes, least_codes: s and m, from -128 to 127, [blocks, small blocks].
    """
    minimums = None if least is None else -least
    levels = ScaleLevels(d, codes.view(np.int8), minimums, None if least_codes is None else least_codes.view(np.int8))
    folded = None if minimums is None or least_codes is None else _folded(minimums, least_codes)
    return BlockedArrays(quants, _folded(d, codes), folded, None, levels)


def _folded(d: Array, small: Array) -> Array:
    """d * s for each small block, float32 [blocks, n]."""
    return d.astype(np.float32)[:, None] * small.astype(np.float32)


def _q2_k(raw: Array) -> BlockedArrays:
    scales = raw[:, :16]
    return _two_levels(_fields(raw[:, 16:80], 2, 32), _float16(raw, 80), scales & 15, _float16(raw, 82), scales >> 4)


def _q3_k(raw: Array) -> BlockedArrays:
    high = _fields(raw[:, :32], 1, 32)  # a set bit means no offset
    quants = _fields(raw[:, 32:96], 2, 32) + np.left_shift(high, np.uint8(2)) - np.uint8(4)
    scales = _nibbles(raw[:, 96:104], 8) | np.left_shift(_fields(raw[:, 104:108], 2, 4), np.uint8(4))
    return _two_levels(quants.view(np.int8), _float16(raw, 108), scales.astype(np.int8) - np.int8(32))


def _q4_k(raw: Array) -> BlockedArrays:
    scales, minimums = _six_bit_scales(raw[:, 4:16])
    return _two_levels(_nibbles(raw[:, 16:], 32), _float16(raw, 0), scales, _float16(raw, 2), minimums)


def _q5_k(raw: Array) -> BlockedArrays:
    scales, minimums = _six_bit_scales(raw[:, 4:16])
    quants = _nibbles(raw[:, 48:], 32) | np.left_shift(_fields(raw[:, 16:48], 1, 32), np.uint8(4))
    return _two_levels(quants, _float16(raw, 0), scales, _float16(raw, 2), minimums)


def _q6_k(raw: Array) -> BlockedArrays:
    quants = _nibbles(raw[:, :128], 64) | np.left_shift(_fields(raw[:, 128:192], 2, 32), np.uint8(4))
    scales = np.ascontiguousarray(raw[:, 192:208]).view(np.int8)
    return _two_levels((quants - np.uint8(32)).view(np.int8), _float16(raw, 208), scales)


def _iq4_xs(raw: Array) -> BlockedArrays:
    high = np.ascontiguousarray(raw[:, 2:4]).view(np.uint16)
    high = (high >> (2 * np.arange(8, dtype=np.uint16))).astype(np.uint8) & np.uint8(3)
    low = np.stack([raw[:, 4:8] & 15, raw[:, 4:8] >> 4], axis=2).reshape(-1, 8)
    scales = (low | (high << np.uint8(4))).astype(np.int8) - np.int8(32)
    return _two_levels(_KVALUES_IQ4[_nibbles(raw[:, 8:], 16)], _float16(raw, 0), scales)


BLOCK_TYPES = {
    "Q4_0": BlockType("int4", 32, "float16", 18, 32, _q4_0),
    "Q4_1": BlockType("uint4", 32, "float16", 20, 32, _q4_1, minimums=True),
    "Q5_0": BlockType("int8", 32, "float16", 22, 32, _q5_0),
    "Q5_1": BlockType("uint8", 32, "float16", 24, 32, _q5_1, minimums=True),
    "Q8_0": BlockType("int8", 32, "float16", 34, 32, _q8_0),
    "IQ4_NL": BlockType("int8", 32, "float16", 18, 32, _iq4_nl),
    "MXFP4": BlockType("int8", 32, "float32", 17, 32, _mxfp4),
    "Q2_K": BlockType("uint4", 16, "float32", 84, 256, _q2_k, minimums=True, outer=256),
    "Q3_K": BlockType("int4", 16, "float32", 110, 256, _q3_k, outer=256),
    "Q4_K": BlockType("uint4", 32, "float32", 144, 256, _q4_k, minimums=True, outer=256),
    "Q5_K": BlockType("uint8", 32, "float32", 176, 256, _q5_k, minimums=True, outer=256),
    "Q6_K": BlockType("int8", 16, "float32", 210, 256, _q6_k, outer=256),
    "IQ4_XS": BlockType("int8", 32, "float32", 136, 256, _iq4_xs, outer=256),
}
