"""Weights as OpenVINO constants. Quantized blocks stay packed, and the engine unpacks them in its matrix product.

The CPU plug-in recognizes the forms below as compressed weights. It would fold any other chain of operators into
float32 at compile time, four to eight times as large.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from transom.graph.weights import UNPACKED, Array, Blocked, BlockedArrays, Dense, Weight
from transom.quantize.rounding import to_int8
from transom_openvino_cpu.precision import ProductForm

Node = Any
"""An `openvino.Node` or `openvino.Output`."""


def constant(array: Array) -> Node:
    """A constant from a NumPy array of any type, including bfloat16, E4M3 and 4-bit types."""
    import openvino as ov
    from openvino import opset13 as op

    name = array.dtype.name
    if name in ("bfloat16", "float8_e4m3fn"):
        kind, bits = (ov.Type.bf16, np.uint16) if name == "bfloat16" else (ov.Type.f8e4m3, np.uint8)
        tensor = ov.Tensor(kind, ov.Shape(list(array.shape)))
        tensor.data.view(bits)[...] = np.asarray(array, order="C").view(bits)
        return op.constant(tensor)
    if name in ("int4", "uint4"):
        return _packed(array.astype(np.int8 if name == "int4" else np.uint8), signed=name == "int4")
    return op.constant(np.asarray(array, order="C"))


def _packed(values: Array, *, signed: bool = False) -> Node:
    """4-bit numbers, two per byte, the first in the low half."""
    import openvino as ov
    from openvino import opset13 as op

    tensor = ov.Tensor(ov.Type.i4 if signed else ov.Type.u4, ov.Shape(list(values.shape)))
    flat = values.reshape(-1).view(np.uint8) & 15
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    tensor.data.reshape(-1)[:] = flat[0::2] | flat[1::2] << 4
    return op.constant(tensor)


def matrix(weight: Weight, form: ProductForm, *, exact: bool) -> Node:
    """A weight [rows, columns] as a float32 node for `MatMul(x, ·, transpose_b=True)`.

    Args:
        exact: store scales and minimums in float32; otherwise those that came as float16 stay float16.
    """
    if isinstance(weight, Dense):
        return _requantized(weight, form.group) if form.kind == "int8" else dense(weight)
    if form.kind == "int8":
        return _requantized(weight, form.group)
    return _blocks(weight, exact=exact)


def dense(weight: Dense) -> Node:
    """A plain tensor as a float32 node, stored in its own type."""
    from openvino import opset13 as op

    node = constant(weight.load())
    return node if weight.dtype == "float32" else op.convert(node, np.float32)


def _requantized(weight: Weight, group: int) -> Node:
    """int8 in groups along the columns, symmetric."""
    from openvino import opset13 as op

    rows, columns = weight.shape
    quants, scales, *_ = to_int8(weight, group).load()
    grouped = op.constant(quants.reshape(rows, -1, group))
    scaled = op.multiply(op.convert(grouped, np.float16), op.constant(scales[..., None]))
    return op.convert(_flat(scaled, rows, columns), np.float32)


def _flat(node: Node, rows: int, columns: int) -> Node:
    from openvino import opset13 as op

    return op.reshape(node, op.constant(np.array([rows, columns], np.int64)), False)


def _blocks(weight: Blocked, *, exact: bool) -> Node:
    """Stored blocks, unchanged: (quants - zero point) * scale, with a minimum as a fractional zero point."""
    from openvino import opset13 as op

    parts = without_flat_blocks(weight.load())
    rows, columns = weight.shape
    wide: Any = np.float32 if exact or weight.scale_dtype == "float32" or _large_zeros(parts) else np.float16
    quants, zeros = _quants_and_zeros(weight, parts, wide)
    node = op.convert(quants, wide)
    if zeros is not None:
        node = op.subtract(node, zeros)
    node = op.multiply(node, op.constant(parts.scales[..., None].astype(wide)))
    node = _flat(node, rows, columns)
    return node if wide is np.float32 else op.convert(node, np.float32)


def _quants_and_zeros(weight: Blocked, parts: BlockedArrays, wide: Any) -> tuple[Node, Node | None]:
    from openvino import opset13 as op

    rows, columns = weight.shape
    quants = parts.quants.reshape(rows, columns // weight.block, weight.block)
    four = weight.dtype in ("int4", "uint4")
    if parts.minimums is not None:
        offset = fractional_zero_points(parts)
        if four:  # signed values and their zero points are shifted by 8, without loss
            shift = 8 if weight.dtype == "int4" else 0
            return _packed((quants.astype(np.int16) + shift).astype(np.uint8)), op.constant(
                (offset + shift).astype(wide)
            )
        shift = 128 if weight.dtype == "int8" else 0
        stored = (quants.astype(np.int16) + shift).astype(np.uint8)
        return op.constant(stored), op.constant((offset + shift).astype(wide))
    zeros = None if parts.zero_points is None else parts.zero_points[..., None]
    if weight.dtype in ("int8", "float8e4m3fn") and zeros is None:
        return constant(quants.astype(UNPACKED[weight.dtype], copy=False)), None
    shift = {"int4": 8, "int8": 128}.get(weight.dtype, 0)
    if zeros is None:
        zeros = np.zeros((rows, columns // weight.block, 1), np.int16)
    stored = (quants.astype(np.int16) + shift).astype(np.uint8)
    points = (zeros.astype(np.int16) + shift).astype(np.uint8)
    pack = _packed if four else op.constant
    return pack(stored), op.convert(pack(points), wide)


def without_flat_blocks(parts: BlockedArrays) -> BlockedArrays:
    """The same numbers without scales of 0 in blocks with a minimum: such a block becomes minimum * (0 - -1)."""
    if parts.minimums is None:
        return parts
    flat = parts.scales == 0
    if not flat.any():
        return parts
    block = parts.quants.shape[1] // parts.scales.shape[1]
    zeros = np.zeros(parts.scales.shape, np.int16) if parts.zero_points is None else parts.zero_points.astype(np.int16)
    return BlockedArrays(
        np.where(np.repeat(flat, block, 1), parts.quants.dtype.type(0), parts.quants),
        np.where(flat, parts.minimums, parts.scales),
        parts.minimums,
        np.where(flat, 0, zeros),
    )


def fractional_zero_points(parts: BlockedArrays) -> Array:
    """float32 [rows, blocks, 1]: z such that scale * (q - z) is scale * (q - zero point) + minimum."""
    assert parts.minimums is not None
    scales = parts.scales.astype(np.float32)
    zeros: Array = -parts.minimums.astype(np.float32) / np.where(scales == 0, np.float32(1), scales)
    if parts.zero_points is not None:
        zeros = zeros + parts.zero_points.astype(np.float32)
    return zeros[..., None]


def _large_zeros(parts: BlockedArrays) -> bool:
    """Whether a fractional zero point exceeds the range of float16."""
    return parts.minimums is not None and bool(np.abs(fractional_zero_points(parts)).max(initial=0) > 6e4)


def rows_of(weight: Weight, ids: Node) -> Node:
    """Rows `ids` [n] of an embedding table, float32 [n, columns]; only these rows are unpacked."""
    from openvino import opset13 as op

    zero = op.constant(np.int64(0))
    if isinstance(weight, Dense):
        found = op.gather(constant(weight.load()), ids, zero)
        return found if weight.dtype == "float32" else op.convert(found, np.float32)
    parts = weight.load()
    rows, columns = weight.shape
    blocks = (rows, columns // weight.block)
    quants = parts.quants.astype(UNPACKED[weight.dtype], copy=False).reshape(*blocks, weight.block)

    def picked(array: Array) -> Node:
        return op.convert(op.gather(constant(array.reshape(*blocks, -1)), ids, zero), np.float32)

    node = picked(quants)
    if parts.zero_points is not None:
        node = op.subtract(node, picked(parts.zero_points))
    node = op.multiply(node, picked(parts.scales))
    if parts.minimums is not None:
        node = op.add(node, picked(parts.minimums))
    return op.reshape(node, op.constant(np.array([-1, columns], np.int64)), False)
