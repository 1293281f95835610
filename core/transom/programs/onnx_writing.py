"""Writes an ONNX model with explicit types throughout, as engines with strongly typed networks need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from transom.graph.weights import Array

OPSET = 24
IR_VERSION = 12
FLOAT = ir.DataType.FLOAT
INT32 = ir.DataType.INT32
INT64 = ir.DataType.INT64
BOOL = ir.DataType.BOOL
FLOAT8 = ir.DataType.FLOAT8E4M3FN

Dim = int | str


class OnnxWriter:
    """Appends nodes to one graph; every value knows its element type."""

    def __init__(self, name: str) -> None:
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name=name)
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._count = 0
        self.scope = ""
        """Prefix of node names: the part of the model that they belong to."""

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[Dim]) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.graph.inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, shape: Sequence[Dim]) -> None:
        value.name, value.shape = name, ir.Shape(shape)
        self.graph.outputs.append(value)

    def __call__(
        self, op_type: str, *inputs: ir.Value | None, dtype: ir.DataType | None = None, **attributes: Any
    ) -> ir.Value:
        """Append a standard operator with one output, of type `dtype` or the first input's type."""
        return self.several(op_type, *inputs, dtypes=(dtype or type_of(inputs[0]),), **attributes)[0]

    def several(
        self, op_type: str, *inputs: ir.Value | None, dtypes: Sequence[ir.DataType], domain: str = "", **attributes: Any
    ) -> tuple[ir.Value, ...]:
        """Append an operator with one output per type; a standard operator unless `domain` is given."""
        self._count += 1
        name = f"{self.scope}{op_type}_{self._count}"
        given = [ir.convenience.convert_attribute(k, v) for k, v in attributes.items()]
        node = ir.Node(domain, op_type, inputs, given, num_outputs=len(dtypes), name=name)
        for i, (value, dtype) in enumerate(zip(node.outputs, dtypes, strict=True)):
            value.name, value.type = name if i == 0 else f"{name}.{i}", ir.TensorType(dtype)
        self.graph.append(node)
        return tuple(node.outputs)

    def cast(self, x: ir.Value, dtype: ir.DataType) -> ir.Value:
        """`x` cast to a type; `x` itself if it has that type."""
        return x if type_of(x) == dtype else self("Cast", x, dtype=dtype, to=int(dtype))

    def ints(self, value: int | Sequence[int]) -> ir.Value:
        return self.constant(np.asarray(value, np.int64))

    def constant(self, array: Array) -> ir.Value:
        """A small constant; equal constants are shared."""
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            tensor = ir.Tensor(np.ascontiguousarray(array), name=f"constant_{len(self._constants)}")
            self._constants[key] = self._initializer(tensor)
        return self._constants[key]

    def number(self, value: float, dtype: ir.DataType) -> ir.Value:
        return self.constant(np.asarray(value, np.float32).astype(dtype.numpy()))

    def softcapped(self, x: ir.Value, cap: float) -> ir.Value:
        """cap * tanh(x / cap), float32; `x` itself if `cap` is 0."""
        if not cap:
            return x
        by = self.number(cap, FLOAT)
        return self("Mul", self("Tanh", self("Div", x, by)), by)

    def weight(self, name: str, dtype: ir.DataType, shape: Sequence[int], load: Callable[[], Array]) -> ir.Value:
        """An initializer whose data is loaded only while the model is written, one at a time."""

        def tensor() -> ir.TensorProtocol:
            return ir.Tensor(np.ascontiguousarray(load()), dtype=dtype, shape=ir.Shape(shape), name=name)

        return self._initializer(ir.LazyTensor(tensor, dtype, ir.Shape(shape), name=name))

    def _initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(
            name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
        )
        self.graph.register_initializer(value)
        return value

    def model(self) -> ir.Model:
        return ir.Model(self.graph, ir_version=IR_VERSION, producer_name="transom")


def type_of(value: ir.Value | None) -> ir.DataType:
    assert value is not None
    assert value.dtype is not None
    return value.dtype
