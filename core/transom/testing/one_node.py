"""A graph of one node from an operator's sample, for asking a backend about one operator."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import onnx_ir as ir

from transom.graph import Graph, GraphBuilder
from transom.graph.passes import infer_types
from transom.ops import Array, OpSchema, Sample

NODE = "tested"


def one_node(schema: OpSchema, sample: Sample, *, dynamic: bool = True) -> tuple[Graph, dict[str, Array]]:
    """The graph and its inputs by name (`x0`, `x1` …; outputs `y0` …).

    Args:
        dynamic: leave the first dimension of every activation open, as in decoder graphs; False: all sizes are fixed.
    """
    b = GraphBuilder(schema.name)
    hasher = hashlib.blake2b(digest_size=16)
    values: list[ir.Value | None] = []
    inputs: dict[str, Array] = {}
    for i, array in enumerate(sample.inputs):
        if array is None:
            values.append(None)
            continue
        array = np.asarray(array)
        if i in sample.constant_inputs:
            dtype = ir.DataType[(sample.dtypes or {}).get(i, str(array.dtype)).upper().replace("FLOAT32", "FLOAT")]
            tensor = ir.Tensor(np.ascontiguousarray(array.astype(dtype.numpy())), dtype=dtype, name=f"constant{i}")
            hasher.update(tensor.tobytes())
            value = ir.Value(
                name=tensor.name, type=ir.TensorType(dtype), shape=ir.Shape(array.shape), const_value=tensor
            )
            b.graph.register_initializer(value)
        else:
            inputs[f"x{i}"] = array
            value = b.input(f"x{i}", str(array.dtype), _shape(array, dynamic))
        values.append(value)
    attributes: dict[str, Any] = dict(sample.attributes)
    outputs = b.nodes(schema.name, *values, outputs=sample.outputs, domain=schema.domain, name=NODE, **attributes)
    for i, value in enumerate(outputs):
        b.output(value, f"y{i}")
    graph = b.finish(weights_hash=hasher.hexdigest())
    return _with_output_types(graph), inputs


def _shape(array: Array, dynamic: bool) -> list[int | str]:
    """Equal sizes share a symbol. Sizes of one stay fixed, because they may be for broadcasting."""
    shape: list[int | str] = [int(d) for d in array.shape]
    packed = array.ndim >= 2 or (array.ndim == 1 and array.dtype == np.int64)
    if dynamic and packed and array.shape[0] != 1:
        shape[0] = f"d{array.shape[0]}"
    return shape


def _with_output_types(graph: Graph) -> Graph:
    """The graph with the element types of its outputs, which ONNX requires; shape inference finds them."""
    return infer_types(graph) if any(v.dtype is None for v in graph.model.graph.outputs) else graph
