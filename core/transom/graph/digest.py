"""The hash of a neutral graph: structure, small constants, function bodies, the decoder's signature and the weights.

The artifact cache uses it as a key, so it is conservative: two graphs with equal digests compute the same function with
the same limits. Saving a graph and opening it again keeps its digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from transom.signature import METADATA_KEY

SMALL = 1024
"""Initializers up to this many bytes are hashed by content; larger ones are weights, covered by `weights_hash`."""


def digest(model: ir.Model, weights_hash: str) -> str:
    """32 hexadecimal digits. Without a `weights_hash`, every weight is read and hashed."""
    hasher = _Hasher(read_weights=not weights_hash)
    hasher.add(weights_hash, sorted(model.graph.opset_imports.items()), model.metadata_props.get(METADATA_KEY, ""))
    hasher.add_graph(model.graph)
    for identifier in sorted(model.functions):
        function = model.functions[identifier]
        hasher.add("function", identifier, sorted(function.opset_imports.items()))
        hasher.add_attributes(function.attributes.values())
        hasher.add_graph(function.graph)
    return hasher.finish()


class _Hasher:
    def __init__(self, *, read_weights: bool) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self._read_weights = read_weights

    def finish(self) -> str:
        return self._hash.hexdigest()

    def add(self, *parts: object) -> None:
        """Hash one record: JSON keeps its parts distinct, and a newline ends it."""
        self._hash.update(json.dumps(parts).encode() + b"\n")

    def add_bytes(self, data: bytes) -> None:
        self.add("bytes", len(data))
        self._hash.update(data)

    def add_graph(self, graph: ir.Graph) -> None:
        for label, values in (("inputs", graph.inputs), ("outputs", graph.outputs)):
            self.add(label, [[v.name, str(v.type), str(v.shape)] for v in values])
        for name in sorted(graph.initializers):
            tensor = graph.initializers[name].const_value
            if tensor is None:
                raise ValueError(f"the initializer {name} has no value")
            self.add("initializer", name)
            self.add_tensor(tensor, read=self._read_weights)
        for node in graph:
            self.add("node", node.domain, node.op_type, node.overload, node.name)
            self.add([None if v is None else v.name for v in node.inputs], [v.name for v in node.outputs])
            self.add_attributes(node.attributes.values())
        self.add("end")

    def add_tensor(self, tensor: ir.TensorProtocol, *, read: bool) -> None:
        self.add(str(tensor.dtype), [int(d) if isinstance(d, int) else str(d) for d in tensor.shape])
        if isinstance(tensor, ir.StringTensor):
            for text in tensor.string_data():
                self.add_bytes(text)
            return
        if read or tensor.nbytes <= SMALL:
            self.add_bytes(tensor.tobytes())

    def add_attributes(self, attributes: Iterable[ir.Attr]) -> None:
        for attribute in sorted(attributes, key=lambda a: a.name):
            self.add("attribute", attribute.name, attribute.ref_attr_name)
            if attribute.ref_attr_name or attribute.value is None:
                continue  # a formal attribute without a default has no type in a file
            self.add(str(attribute.type))
            match attribute.type:
                case ir.AttributeType.GRAPH:
                    self.add_graph(attribute.as_graph())
                case ir.AttributeType.GRAPHS:
                    for graph in attribute.as_graphs():
                        self.add_graph(graph)
                case ir.AttributeType.TENSOR:
                    self.add_tensor(attribute.as_tensor(), read=True)
                case ir.AttributeType.TENSORS:
                    for tensor in attribute.as_tensors():
                        self.add_tensor(tensor, read=True)
                case ir.AttributeType.FLOAT | ir.AttributeType.FLOATS:  # files store these as float32
                    self.add_bytes(np.asarray(attribute.value, np.float32).tobytes())
                case ir.AttributeType.INT | ir.AttributeType.INTS:
                    self.add(np.asarray(attribute.value, np.int64).tolist())
                case _:
                    self.add(str(attribute.value))
