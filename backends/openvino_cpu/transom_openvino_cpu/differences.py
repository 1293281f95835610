"""Calls of ONNX operators for which OpenVINO 2026.4 computes something else than ONNX defines, without an error.

Found with ONNX's backend node tests (`benchmarks/onnx_graphs.py`). Such a node is refused, and one with a function
body then runs in simpler operators.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transom.graph.reading import attributes_of, constant_of

if TYPE_CHECKING:
    import onnx_ir as ir

_BOUNDARY = frozenset({
    "BFLOAT16", "FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ", "FLOAT8E8M0", "FLOAT4E2M1", "INT4",
    "UINT4", "INT2", "UINT2", "STRING", "COMPLEX64", "COMPLEX128",
})  # fmt: skip
"""Element types that OpenVINO does not take or return as NumPy arrays."""


_BYTES = frozenset({"INT8", "UINT8"})


def difference(node: ir.Node) -> str:
    """Why OpenVINO would compute the node wrong, or could not take its values; empty if there is nothing known."""
    import onnx_ir as ir

    for value in (*node.inputs, *node.outputs):
        if value is None:
            continue
        if isinstance(value.type, ir.SequenceType | ir.OptionalType):
            return "OpenVINO has no sequences and no optional values"
        if value.dtype == ir.DataType.STRING:
            return "OpenVINO has no operators on strings"
        if value.dtype == ir.DataType.DOUBLE:
            return "OpenVINO computes float64 in float32"
        at_the_edge = value.is_graph_input() or value.is_graph_output()
        if at_the_edge and value.dtype is not None and value.dtype.name in _BOUNDARY:
            return f"OpenVINO does not exchange arrays of {value.dtype.name}"
    rule = _RULES.get(node.op_type)
    return "" if rule is None else rule(node, attributes_of(node))


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


def _used(node: ir.Node, index: int) -> bool:
    return index < len(node.outputs) and bool(node.outputs[index].uses() or node.outputs[index].is_graph_output())


def _narrow(node: ir.Node, attributes: dict[str, Any]) -> str:
    """OpenVINO computes 8-bit integers in float32. What it rounds or cuts, ONNX cuts or wraps."""
    kind = node.outputs[0].dtype or next((v.dtype for v in node.inputs if v is not None), None)
    return f"OpenVINO's {node.op_type} does not wrap {kind.name}" if kind is not None and kind.name in _BYTES else ""


def _attention(node: ir.Node, attributes: dict[str, Any]) -> str:
    return "OpenVINO computes the scores of Attention differently from ONNX" if _used(node, 3) else ""


def _einsum(node: ir.Node, attributes: dict[str, Any]) -> str:
    return "OpenVINO's Einsum takes no scalars" if any(_rank(v) == 0 for v in node.inputs) else ""


def _recurrent(node: ir.Node, attributes: dict[str, Any]) -> str:
    if attributes.get("layout", 0):
        return f"OpenVINO ignores the attribute layout of {node.op_type}"
    if _input(node, 7) is not None:
        return "OpenVINO's LSTM has no peepholes"
    return ""


def _pool(node: ir.Node, attributes: dict[str, Any]) -> str:
    """ONNX drops a last window that starts behind the input. There is none if each stride reaches into the kernel."""
    if not attributes.get("ceil_mode", 0):
        return ""
    kernel = list(attributes["kernel_shape"])
    strides = list(attributes.get("strides") or [1] * len(kernel))
    dilations = list(attributes.get("dilations") or [1] * len(kernel))
    ends = list(attributes.get("pads") or [0] * 2 * len(kernel))[len(kernel) :]
    for size, stride, dilation, end in zip(kernel, strides, dilations, ends, strict=True):
        if stride + end > (size - 1) * dilation + 1:
            return f"OpenVINO's {node.op_type} may add a window behind the input (ceil_mode)"
    return ""


def _quantize(node: ir.Node, attributes: dict[str, Any]) -> str:
    import onnx_ir as ir

    zero = _input(node, 2)
    declared = ir.DataType(attributes.get("output_dtype", 0))
    kind = (None if zero is None else zero.dtype) or declared or ir.DataType.UINT8
    if kind.name.startswith("FLOAT"):
        return f"OpenVINO rounds to {kind.name} differently from ONNX, and turns NaN into numbers"
    return f"OpenVINO quantizes to {kind.name} with errors" if kind.bitwidth == 16 else ""


def _reduce(node: ir.Node, attributes: dict[str, Any]) -> str:
    data = node.inputs[0]
    empty = data is not None and data.shape is not None and 0 in data.shape
    return f"OpenVINO's {node.op_type} of no elements is not ONNX's" if empty else ""


def _resize(node: ir.Node, attributes: dict[str, Any]) -> str:
    mode = attributes.get("coordinate_transformation_mode", "half_pixel")
    if attributes.get("antialias", 0):
        return "OpenVINO's Resize has no antialiasing filter like ONNX's"
    if attributes.get("exclude_outside", 0):
        return "OpenVINO's Resize ignores exclude_outside"
    if attributes.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        return "OpenVINO's Resize does not keep the aspect ratio"
    if mode in ("tf_crop_and_resize", "half_pixel_symmetric"):
        return f"OpenVINO's Resize has no coordinate mode {mode}"
    if mode == "align_corners" and (scales := _input(node, 2)) is not None:
        known = constant_of(scales)
        if known is None or (known % 1 != 0).any():
            return "OpenVINO's Resize aligns the corners of a rounded size, ONNX those of the exact one"
    return ""


def _roi_align(node: ir.Node, attributes: dict[str, Any]) -> str:
    return "OpenVINO's RoiAlign takes another maximum" if attributes.get("mode", "avg") == "max" else ""


def _loop(node: ir.Node, attributes: dict[str, Any]) -> str:
    known = constant_of(_input(node, 0))
    endless = known is not None and known.reshape(-1)[0] < 0
    return "OpenVINO's Loop with a negative trip count never ends" if endless else ""


_RULES = {
    "Attention": _attention,
    "AveragePool": _pool,
    "Einsum": _einsum,
    "GRU": _recurrent,
    "LSTM": _recurrent,
    "LpPool": _pool,
    "Loop": _loop,
    "MaxPool": _pool,
    "QuantizeLinear": _quantize,
    "RNN": _recurrent,
    "Resize": _resize,
    "RoiAlign": _roi_align,
    **dict.fromkeys(("Abs", "Add", "BitShift", "Div", "Mul", "Neg", "Sub", "Sum"), _narrow),
    **{f"Reduce{kind}": _reduce for kind in ("Max", "Min", "Mean", "Prod")},
}
