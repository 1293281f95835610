"""Finding NaN and infinity in weights when they are read: an error that names the tensor is better than garbage text.

The check compares exponent bits, so it costs one pass at memory speed for every float type.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from transom.errors import SourceError
from transom.graph.weights import Array

if TYPE_CHECKING:
    import onnx_ir as ir

    from transom.graph import Graph

_CHUNK = 1 << 20
_EXPONENT = {"float32": (np.uint32, 0x7F800000), "float16": (np.uint16, 0x7C00), "bfloat16": (np.uint16, 0x7F80)}
_PRODUCTS = {
    *("BatchNormalization", "Conv", "ConvTranspose", "Einsum", "GRU", "Gemm", "GroupNormalization"),
    *("InstanceNormalization", "LSTM", "LayerNormalization", "MatMul", "RMSNormalization", "RNN"),
}
_PASSES_ON = {"Cast", "DequantizeLinear", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}


def is_finite(array: Array) -> bool:
    """Whether every number of a float array (float16, bfloat16, float32) is finite."""
    word, mask = _EXPONENT[array.dtype.name]
    if not array.flags.c_contiguous:
        array = np.ascontiguousarray(array)
    flat = array.reshape(-1).view(word)
    bits = word(mask)
    starts = range(0, flat.size, _CHUNK)
    return not any(bool(((flat[at : at + _CHUNK] & bits) == bits).any()) for at in starts)


def require_finite(array: Array, name: str, where: object, what: str = "") -> Array:
    """Return the array.

    Raises:
        SourceError: it has NaN or infinity; the message names the tensor and the count.
    """
    if not is_finite(array):
        raise _damaged(array, f"{name} in {where}", "convert", what)
    return array


def _damaged(array: Array, tensor: str, made_by: str, what: str = "") -> SourceError:
    numbers = np.asarray(array, np.float64)
    count = int(np.count_nonzero(~np.isfinite(numbers)))
    kind = "NaN" if np.isnan(numbers).any() else "infinite"
    return SourceError(
        f"The tensor {tensor} has {kind} values{what} ({count} of {numbers.size})",
        f"The model was damaged in training, conversion or download: get it again or {made_by} it again",
    )


def require_finite_graph(graph: Graph, where: object) -> None:
    """Check the weights of a graph that another program wrote. Reads each weight once.

    Graphs use infinity in masks and limits, and a single NaN in comparisons. So infinity is an error only in weights of
    a matrix product, a convolution or a normalization, and NaN only in tensors of more than one number.

    Raises:
        SourceError: damaged weights; the message names the tensor and the count.
    """
    for name, value in graph.model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.dtype.name not in ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE") or tensor.size < 2:
            continue
        array = tensor.numpy()
        if array.dtype.name in _EXPONENT:
            if is_finite(array):
                continue
        elif np.isfinite(array).all():
            continue
        if np.isnan(array).any() or _is_multiplied(value):
            raise _damaged(array, f"{name} in {where}", "export")


def _is_multiplied(value: ir.Value) -> bool:
    waiting, seen = [value], {id(value)}
    while waiting:
        for node, _ in waiting.pop().uses():
            if node.op_type in _PRODUCTS:
                return True
            if node.op_type in _PASSES_ON:
                for output in node.outputs:
                    if id(output) not in seen:
                        seen.add(id(output))
                        waiting.append(output)
    return False
