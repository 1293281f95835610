"""Abstract interpretation of a graph without its weights: all shapes, and values that depend only on shapes and masks.

An exported decoder is mostly arithmetic on lengths: shapes, ranges, masks, repeated heads. There are too many ways to
write it for pattern matching; computing it for a few lengths shows what it means. Each value becomes a `Fact`: its
element type, its shape and, if it depends on no weight and no token id, its array.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from transom.graph.reading import attributes_of
from transom.graph.weights import Array
from transom.ops import find
from transom.ops.functions import OPSET

SMALL_WEIGHT = 1 << 16
"""Initializers up to this many bytes are read; of larger ones, which are weights, only the shape is known."""
_MAX_DATA_BYTES = 4096
_SHAPED = ("Shape", "Size")
REFERENCE_ERRORS = (ValueError, IndexError, TypeError, KeyError, AttributeError, RuntimeError, ArithmeticError)
"""Exceptions that NumPy and onnx's reference raise if a node cannot be computed."""


@dataclass(frozen=True)
class Fact:
    """What is known about a value for one choice of lengths."""

    dtype: ir.DataType | None = None
    shape: tuple[int, ...] | None = None
    array: Array | None = None

    @classmethod
    def of(cls, array: Array) -> Fact:
        return cls(ir.DataType.from_numpy(array.dtype), tuple(array.shape), array)


UNKNOWN = Fact()
Facts = dict[int, Fact]
"""The fact of each value, by the value's `id`."""


class AbstractInterpreter:
    """Computes facts for one model. Results are memoized, since the layers of a decoder repeat the same nodes."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self._forms: dict[int, bytes] = {}
        self._seen: dict[bytes, tuple[Fact, ...]] = {}
        self._initial: Facts = {id(v): self._stored(v) for v in model.graph.initializers.values()}

    @staticmethod
    def _stored(value: ir.Value) -> Fact:
        tensor = value.const_value
        assert tensor is not None
        shape = tuple(int(d) for d in tensor.shape.numpy())
        small = tensor.nbytes <= SMALL_WEIGHT and not isinstance(tensor, ir.LazyTensor)
        return Fact(tensor.dtype, shape, tensor.numpy() if small else None)

    def run(self, inputs: Mapping[str, Fact]) -> Facts:
        """Facts of every value of the main graph, given the facts of its inputs."""
        facts = dict(self._initial)
        for value in self.model.graph.inputs:
            facts[id(value)] = inputs.get(str(value.name), UNKNOWN)
        for node in self.model.graph:
            arguments = [None if v is None else facts.get(id(v), UNKNOWN) for v in node.inputs]
            for value, fact in zip(node.outputs, self._node(node, arguments), strict=True):
                facts[id(value)] = fact
        return facts

    def _node(self, node: ir.Node, arguments: Sequence[Fact | None]) -> tuple[Fact, ...]:
        nothing = (UNKNOWN,) * len(node.outputs)
        if node.op_type in ("If", "Loop", "Scan"):
            return nothing
        key = self._key(node, arguments)
        if key not in self._seen:
            self._seen[key] = _compute(node, arguments) or _infer(node, arguments) or nothing
        return self._seen[key]

    def _key(self, node: ir.Node, arguments: Sequence[Fact | None]) -> bytes:
        if id(node) not in self._forms:
            proto = ir.to_proto(node)
            proto.name, proto.doc_string = "", ""
            del proto.input[:], proto.output[:], proto.metadata_props[:]
            self._forms[id(node)] = proto.SerializeToString(deterministic=True) + bytes([len(node.outputs) % 256])
        h = hashlib.blake2b(self._forms[id(node)], digest_size=16)
        for fact in arguments:
            if fact is None:
                h.update(b"-")
                continue
            h.update(f"{fact.dtype} {fact.shape} ".encode())
            if fact.array is not None:
                h.update(np.ascontiguousarray(fact.array).tobytes())
        return h.digest()


def _compute(node: ir.Node, arguments: Sequence[Fact | None]) -> tuple[Fact, ...] | None:
    """The node's outputs as arrays if its inputs are arrays; otherwise None."""
    if node.op_type in _SHAPED and not node.domain:
        fact = arguments[0]
        if fact is None or fact.shape is None:
            return None
        if node.op_type == "Size":
            return (Fact.of(np.asarray(int(np.prod(fact.shape)), np.int64)),)
        start = node.attributes.get_int("start", 0)
        end = node.attributes.get_int("end", len(fact.shape))
        return (Fact.of(np.asarray(fact.shape, np.int64)[start:end]),)
    if any(f is not None and f.array is None for f in arguments) or (not arguments and node.op_type != "Constant"):
        return None
    try:
        results = call(node, [None if f is None else f.array for f in arguments])
    except REFERENCE_ERRORS:
        return None
    return tuple(Fact.of(np.asarray(r)) if isinstance(r, np.ndarray | np.generic) else UNKNOWN for r in results)


def call(node: ir.Node, inputs: Sequence[Array | None]) -> tuple[Array, ...]:
    """Run one node through its reference.

    Raises:
        KeyError: the operator has no reference. Others: whatever the reference raises for unsuitable inputs.
    """
    schema = find(node.domain, node.op_type)
    if schema is None:
        raise KeyError(node.op_type)
    attributes: dict[str, Any] = attributes_of(node)
    attributes["__outputs__"] = len(node.outputs)
    results = schema.reference(inputs, attributes)
    return tuple(results) + (np.zeros(0, np.float32),) * (len(node.outputs) - len(results))


def _infer(node: ir.Node, arguments: Sequence[Fact | None]) -> tuple[Fact, ...] | None:
    """Element types and shapes of the outputs from ONNX's shape inference, which may read small constant inputs."""
    import onnx
    from onnx import helper, numpy_helper

    if node.domain not in ("", "ai.onnx"):
        return None
    proto = ir.to_proto(node)
    del proto.input[:], proto.output[:]
    types: dict[str, Any] = {}
    data: dict[str, Any] = {}
    for i, fact in enumerate(arguments):
        if fact is None:
            proto.input.append("")
            continue
        name = f"x{i}"
        proto.input.append(name)
        if fact.dtype is None:
            return None
        types[name] = helper.make_tensor_type_proto(int(fact.dtype), fact.shape)
        if fact.array is not None and fact.array.nbytes <= _MAX_DATA_BYTES:
            data[name] = numpy_helper.from_array(fact.array, name)
    proto.output.extend(f"y{i}" for i in range(len(node.outputs)))
    schema = onnx.defs.get_schema(node.op_type, OPSET, "")
    try:
        inferred = onnx.shape_inference.infer_node_outputs(
            schema, proto, types, data, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=12
        )
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        return None
    return tuple(_fact(inferred.get(f"y{i}")) for i in range(len(node.outputs)))


def _fact(proto: Any) -> Fact:
    if proto is None or not proto.HasField("tensor_type"):
        return UNKNOWN
    dtype = ir.DataType(proto.tensor_type.elem_type) if proto.tensor_type.elem_type else None
    if not proto.tensor_type.HasField("shape"):
        return Fact(dtype)
    dims = [d.dim_value if d.HasField("dim_value") else None for d in proto.tensor_type.shape.dim]
    return Fact(dtype, None if any(d is None for d in dims) else tuple(int(d or 0) for d in dims))
