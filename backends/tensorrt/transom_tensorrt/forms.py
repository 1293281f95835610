"""Matrix products in the forms that TensorRT fuses: how a weight is stored in the network, and how its input is
quantized.

A matrix is written as [columns, rows], the order of `MatMul`: TensorRT then keeps one copy of it for all profiles,
instead of one transposed copy for each (tensorrt-rtx 1.7). Forms that TensorRT refuses are rewritten where that is
exact: blocks with minimums or zero points become symmetric blocks and a second, small product.

| Form | Weights | Input | Product |
|---|---|---|---|
| `plain` | the network's dtype | the same | the same |
| `int4` | 4 bits in blocks of 16, 32, 64 or 128 columns | the network's dtype | the same |
| `int8` | 8 bits, a scale for each row | the network's dtype | the same |
| `float8` | E4M3, a scale for each row | the network's dtype | the same |
| `float8 x float8` | E4M3, a scale for each row | E4M3, one scale | float32 |

The last one has float32 scales: with float16 scales TensorRT writes the product of the unscaled codes in float16, whose
limit is 65504, and applies the scales afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from transom.errors import option
from transom.graph.weights import Array, Blocked, BlockedArrays, Dense, Weight, affine, dequantize
from transom.programs.onnx_writing import FLOAT, FLOAT8, OnnxWriter

INT4_BLOCKS = (16, 32, 64, 128)
CENTERS = {"int4": 0, "uint4": -8}
"""Offset from a stored code to its value in -8 … 7."""


def refusal(weight: Weight) -> str:
    """Why there is no product with such a matrix; empty if there is one."""
    if len(weight.shape) != 2:
        return f"a matrix with {len(weight.shape)} axes"
    if isinstance(weight, Blocked) and weight.shape[1] % weight.block:
        return f"blocks of {weight.block} in {weight.shape[1]} columns"
    return ""


def kept(weight: Weight) -> bool:
    """Whether a quantized matrix is used as stored. Others are requantized, or unpacked in a float32 network, which is
    for checking."""
    if not isinstance(weight, Blocked):
        return False
    if weight.dtype in CENTERS:
        return weight.block in INT4_BLOCKS
    return weight.block == weight.shape[1] and not weight.has_minimums and not weight.has_zero_points


class LastRead:
    """Caches the parts of the matrix that was read last: they are written one after the other, and a matrix that is
    quantized while it is read is slow to read."""

    def __init__(self) -> None:
        self._weight: Blocked | None = None
        self._parts: BlockedArrays | None = None

    def __call__(self, weight: Blocked) -> BlockedArrays:
        if self._weight is not weight or self._parts is None:
            self._weight, self._parts = weight, weight.load()
        return self._parts


@dataclass
class LinearForm:
    """One product: rows in, rows out."""

    write: OnnxWriter
    number: ir.DataType
    """The network's dtype."""
    weight: Weight
    name: str
    read: Callable[[Blocked], BlockedArrays]
    """One `LastRead` for all products of a network."""
    rounded: bool = False
    """Whether the input is quantized to E4M3."""

    def __call__(self, x: ir.Value) -> ir.Value:
        """x @ weightᵀ; x [tokens, columns] in any floating-point dtype."""
        if isinstance(self.weight, Dense) or (self.number == FLOAT and not kept(self.weight)):
            return self._plain(x, self.weight)
        if self.weight.dtype == "float8e4m3fn" and self.rounded:
            return self._float8_twice(x, self.weight)
        if self.weight.dtype in CENTERS:
            return self._int4(x, self.weight)
        return self._by_rows(x, self.weight)

    def _plain(self, x: ir.Value, weight: Weight) -> ir.Value:
        rows, columns = weight.shape

        def load() -> Array:
            return narrowed(dequantize(weight).T, self.number, self.name)

        return self._product(x, self.write.weight(self.name, self.number, (columns, rows), load))

    def _product(self, x: ir.Value, matrix: ir.Value) -> ir.Value:
        return self.write("MatMul", self.write.cast(x, self.number), matrix)

    def _by_rows(self, x: ir.Value, weight: Blocked) -> ir.Value:
        if not kept(weight):
            raise ValueError(f"{self.name} is {weight.dtype} in blocks of {weight.block}, and was not requantized")
        w, (rows, columns) = self.write, weight.shape
        dtype = FLOAT8 if weight.dtype == "float8e4m3fn" else ir.DataType.INT8
        quants = w.weight(self.name, dtype, (columns, rows), lambda: self.read(weight).quants.T)
        scales = w.weight(f"{self.name}.scales", self.number, (rows,), self._scales(weight, self.number))
        return self._product(x, w("DequantizeLinear", quants, scales, dtype=self.number, axis=1))

    def _float8_twice(self, x: ir.Value, weight: Blocked) -> ir.Value:
        w, (rows, columns) = self.write, weight.shape
        quants = w.weight(self.name, FLOAT8, (columns, rows), lambda: self.read(weight).quants.T)
        scales = w.weight(f"{self.name}.scales", FLOAT, (rows,), self._scales(weight, FLOAT))
        matrix = w("DequantizeLinear", quants, scales, dtype=FLOAT, axis=1)
        return w("MatMul", w.cast(x, FLOAT), matrix)

    def _scales(self, weight: Blocked, number: ir.DataType) -> Callable[[], Array]:
        return lambda: narrowed(self.read(weight).scales.reshape(-1), number, f"{self.name}'s scales")

    def _int4(self, x: ir.Value, weight: Blocked) -> ir.Value:
        """Blocks along the columns; minimums and zero points become a second product, with sums of each block's inputs.

        sum_k x_k (s (q_k - z) + m) = sum_k x_k s (q_k - 8) + (sum_k x_k) (m + s (8 - z)), which reads one more number
        for each block.
        """
        w, (rows, columns), block = self.write, weight.shape, weight.block
        center = CENTERS[weight.dtype]

        def quants() -> Array:
            codes = self.read(weight).quants.astype(np.int8) + np.int8(center)
            return codes.T.astype(ml_dtypes.int4)

        def scales() -> Array:
            return narrowed(affine(self.read(weight), center)[0].T, self.number, f"{self.name}'s scales")

        matrix = w("DequantizeLinear",
                   w.weight(self.name, ir.DataType.INT4, (columns, rows), quants),
                   w.weight(f"{self.name}.scales", self.number, (columns // block, rows), scales),
                   dtype=self.number, axis=0, block_size=block)  # fmt: skip
        x = w.cast(x, self.number)
        product = w("MatMul", x, matrix)
        if not _shifted(weight):
            return product

        def shifts() -> Array:
            stored, minimums, zero = affine(self.read(weight), center)
            shift = -np.float32(zero) * stored.astype(np.float32)
            return narrowed((shift if minimums is None else shift + minimums.astype(np.float32)).T, self.number,
                            f"{self.name}'s minimums")  # fmt: skip

        by_block = w("Reshape", w.cast(x, FLOAT), w.ints([-1, columns // block, block]))
        sums = w("ReduceSum", by_block, w.ints([2]), keepdims=0)
        small = w.weight(f"{self.name}.minimums", self.number, (columns // block, rows), shifts)
        return w("Add", product, w("MatMul", w.cast(sums, self.number), small))


def _shifted(weight: Blocked) -> bool:
    """Whether a code of -8 … 7 times its scale differs from the weight by a shift."""
    return weight.has_minimums or weight.has_zero_points or weight.dtype == "uint4"


def rounded_to_float8(w: OnnxWriter, x: ir.Value, scale: float) -> ir.Value:
    """Quantize x to E4M3 with a scale and dequantize it to x's dtype; beyond 448 scales it saturates."""
    assert x.dtype is not None
    by = w.number(max(scale, float(np.finfo(np.float16).tiny)), x.dtype)
    zero = w.constant(np.zeros((), ml_dtypes.float8_e4m3fn))
    codes = w("QuantizeLinear", x, by, zero, dtype=FLOAT8, saturate=1)
    return w("DequantizeLinear", codes, by, zero, dtype=x.dtype)


def narrowed(array: Array, number: ir.DataType, name: str) -> Array:
    """An array converted to another dtype.

    Raises:
        OptionError: a finite number would become infinite.
    """
    from transom.errors import OptionError

    kept_as: Any = number.numpy()
    with np.errstate(over="ignore"):
        narrow: Array = array.astype(kept_as)
    if number == ir.DataType.FLOAT16 and not np.isfinite(narrow).all() and np.isfinite(array.astype(np.float32)).all():
        largest = float(np.abs(array.astype(np.float32)).max())
        raise OptionError(
            f"{name} has numbers up to {largest:.4g}, and float16 ends at 65504",
            f"Use {option('precision', 'bf16')}, which has the range of float32, on sm_80 and newer, "
            f"or {option('precision', 'exact')}",
        )
    return narrow
