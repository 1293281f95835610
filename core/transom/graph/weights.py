"""Weights of the neutral graph: lazy, memory-mapped where the file allows, and still quantized if they were.

`Dense` is a plain tensor. `Blocked` is a matrix quantized in blocks along its last axis,

    w[n, k] = scale[n, k // block] * (q[n, k] - zero_point[n, k // block]) + minimum[n, k // block]

which the graph expresses as a block `DequantizeLinear` (and an `Add` for the minimums). q is an integer or an 8-bit
float; one scale per row is a block as wide as the matrix. Nothing is read from the file before `load` is called, and
nothing is kept afterwards: each caller decides how long to keep the arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeAlias

import ml_dtypes
import numpy as np

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

DENSE_DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
BlockedDtype: TypeAlias = Literal["int4", "uint4", "int8", "uint8", "float8e4m3fn"]
"""Element types of a `Blocked` matrix, by their ONNX names."""
BITS: dict[BlockedDtype, int] = {"int4": 4, "uint4": 4, "int8": 8, "uint8": 8, "float8e4m3fn": 8}
FLOAT8: Any = np.dtype(ml_dtypes.float8_e4m3fn)
"""E4M3 without infinities: Micikevicius et al. 2022, FP8 formats for deep learning (arXiv:2209.05433)."""
UNPACKED: dict[BlockedDtype, Any] = {
    "int4": np.dtype(np.int8),
    "uint4": np.dtype(np.uint8),
    "int8": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
    "float8e4m3fn": FLOAT8,
}
"""The NumPy type that holds one unpacked element."""


@dataclass(frozen=True)
class Dense:
    """A plain tensor, read on demand."""

    shape: tuple[int, ...]
    dtype: Literal["float32", "float16", "bfloat16"]
    load: Callable[[], Array]
    """Returns an array of `shape` and `dtype`. It may be a view of a memory map: do not write to it."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * int(DENSE_DTYPES[self.dtype].itemsize)


class ScaleLevels(NamedTuple):
    """Scales, and minimums, in two levels: a number for `Blocked.outer` columns times a small integer for each block.

    Their products are `BlockedArrays.scales` and `.minimums`, exactly.
    """

    scales: Array
    """float16 [N, K / outer]."""
    scale_codes: Array
    """int8 [N, K / block]."""
    minimums: Array | None = None
    """As `scales`."""
    minimum_codes: Array | None = None
    """As `scale_codes`."""


class BlockedArrays(NamedTuple):
    """The parts of a `Blocked` matrix [N, K], unpacked to one array element per number."""

    quants: Array
    """int8, uint8 or float8 (see `UNPACKED`) [N, K]; 4-bit values are int8 or uint8."""
    scales: Array
    """float16 or float32 [N, K / block]."""
    minimums: Array | None = None
    """Same shape and dtype as `scales`; added after scaling."""
    zero_points: Array | None = None
    """Same dtype as `quants`, [N, K / block]; subtracted before scaling."""
    levels: ScaleLevels | None = None
    """Where `scales` and `minimums` come from, if they were stored in two levels."""


@dataclass(frozen=True)
class Blocked:
    """A matrix quantized in blocks of `block` columns along its last axis."""

    shape: tuple[int, int]
    block: int
    dtype: BlockedDtype
    scale_dtype: Literal["float16", "float32"]
    load: Callable[[], BlockedArrays]
    has_minimums: bool = False
    has_zero_points: bool = False
    outer: int = 0
    """Columns whose scales were stored in two levels, and which share the outer one: `BlockedArrays.levels`. 0: one
    level."""

    @property
    def nbytes(self) -> int:
        rows, columns = self.shape
        blocks = rows * columns // self.block
        scale = DENSE_DTYPES[self.scale_dtype].itemsize * (2 if self.has_minimums else 1)
        zero = BITS[self.dtype] / 8 if self.has_zero_points else 0
        return int(rows * columns * BITS[self.dtype] / 8 + blocks * (scale + zero))


Weight: TypeAlias = Dense | Blocked


def dense(array: Array) -> Dense:
    """A weight from an array in memory."""
    names = {v: k for k, v in DENSE_DTYPES.items()}
    if array.dtype not in names:
        raise ValueError(f"a dense weight is float32, float16 or bfloat16, not {array.dtype}")
    return Dense(tuple(array.shape), names[array.dtype], lambda: array)  # type: ignore[arg-type]


def dequantize(weight: Weight, rows: Array | slice | None = None) -> Array:
    """The weight in float32; with `rows`, only those rows."""
    pick: Any = slice(None) if rows is None else rows
    if isinstance(weight, Dense):
        part: Array = weight.load()[pick].astype(np.float32)
        return part
    q, scales, minimums, zeros, _ = weight.load()
    q = q[pick]
    n, k = q.shape
    out: Array = q.reshape(n, k // weight.block, weight.block).astype(np.float32)
    if zeros is not None:
        out -= zeros[pick][..., None].astype(np.float32)
    out *= scales[pick][..., None].astype(np.float32)
    if minimums is not None:
        out += minimums[pick][..., None].astype(np.float32)
    return out.reshape(n, k)


def preloaded(weight: Weight) -> Weight:
    """The same weight with its content read into memory, for several passes over it."""
    if isinstance(weight, Dense):
        array = weight.load()
        return replace(weight, load=lambda: array)
    parts = weight.load()
    return replace(weight, load=lambda: parts)


def take_rows(weight: Weight, index: Array | slice) -> Weight:
    """The same weight with its rows reordered or selected; lossless for both forms.

    Used to undo GGUF's interleaving of rotated heads and to split fused projections.
    """
    rows = len(range(*index.indices(weight.shape[0]))) if isinstance(index, slice) else len(index)
    if isinstance(weight, Dense):
        whole = weight.load
        return replace(weight, shape=(rows, *weight.shape[1:]), load=lambda: whole()[index])
    inner = weight.load

    def load() -> BlockedArrays:
        parts = inner()
        minimums, zeros = (None if part is None else part[index] for part in (parts.minimums, parts.zero_points))
        levels = parts.levels
        if levels is not None:
            least, codes = (None if p is None else p[index] for p in (levels.minimums, levels.minimum_codes))
            levels = ScaleLevels(levels.scales[index], levels.scale_codes[index], least, codes)
        return BlockedArrays(parts.quants[index], parts.scales[index], minimums, zeros, levels)

    return replace(weight, shape=(rows, weight.shape[1]), load=load)


def concat_rows(weights: Sequence[Weight]) -> Weight | None:
    """The weights stacked along the first axis, or None if their forms differ."""
    first = weights[0]
    rows = sum(w.shape[0] for w in weights)
    if isinstance(first, Dense):
        if any(not isinstance(w, Dense) or w.dtype != first.dtype or w.shape[1:] != first.shape[1:] for w in weights):
            return None
        plain = [w.load for w in weights if isinstance(w, Dense)]
        return replace(first, shape=(rows, *first.shape[1:]), load=lambda: np.concatenate([p() for p in plain]))
    blocked = [w for w in weights if isinstance(w, Blocked)]
    form = replace(first, shape=(0, first.shape[1]), load=first.load)
    for w in weights:
        if not isinstance(w, Blocked) or replace(w, shape=(0, w.shape[1]), load=first.load) != form:
            return None

    def load() -> BlockedArrays:
        loaded: list[BlockedArrays] = [w.load() for w in blocked]
        levels = [each.levels for each in loaded if each.levels is not None]
        both = ScaleLevels(*_stacked(levels)) if len(levels) == len(loaded) else None
        quants, scales, minimums, zeros = _stacked([each[:4] for each in loaded])
        return BlockedArrays(quants, scales, minimums, zeros, both)

    return replace(first, shape=(rows, first.shape[1]), load=load)


def _stacked(parts: Sequence[tuple[Array | None, ...]]) -> list[Any]:
    """Each field of all parts, one behind the other."""
    columns: Any = zip(*parts, strict=True)
    return [None if column[0] is None else np.concatenate(column) for column in columns]


def affine(parts: BlockedArrays, center: int) -> tuple[Array, Array | None, int]:
    """Scales, minimums and one common zero point: scale * (quant - zero) + minimum, for quants stored unsigned.

    Zero points that differ between blocks are folded into the minimums, in float32.

    Args:
        center: the number that was added to the quants to make them unsigned.
    """
    scales, minimums, zeros = parts.scales, parts.minimums, parts.zero_points
    if zeros is not None:
        first = zeros.flat[0] if zeros.size else 0
        if (zeros == first).all():
            return scales, minimums, center + int(first)
        wide: Any = scales.astype(np.float32)
        shift = -wide * zeros.astype(np.float32)
        return wide, shift if minimums is None else shift + minimums.astype(np.float32), center
    return scales, minimums, center
