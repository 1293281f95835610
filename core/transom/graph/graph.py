"""The neutral graph: an `onnx_ir.Model` that is always a valid ONNX model, with lazy weights.

Backends read `graph.model` and must not change it; the host rewrites it with named passes (`transom.graph.passes`).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from transom.errors import SourceError
from transom.graph.digest import SMALL, digest
from transom.signature import METADATA_KEY, Decoder
from transom.typed import WrongType, from_json

PRODUCER = "transom"
_NOTES = "transom.notes"


class Graph:
    """A model in the form that every backend receives.

    Attributes:
        model: the ONNX model; standard operators at opset 24, and the domain `transom`.
        weights_hash: identifies the content of the weights: a hash of the file they came from.
        notes: what was changed on import (a dequantized tensor, a checkpoint's quirk), for the report.
    """

    def __init__(self, model: ir.Model, *, weights_hash: str, notes: Sequence[str] = ()) -> None:
        self.model = model
        self.weights_hash = weights_hash
        self.notes = tuple(notes)

    @property
    def name(self) -> str:
        return self.model.graph.name or "model"

    @functools.cached_property
    def decoder(self) -> Decoder | None:
        """Sizes and cache shapes if the graph is a decoder with the standard inputs and outputs; otherwise None.

        Raises:
            SourceError: the file states a decoder that cannot be.
        """
        text = self.model.metadata_props.get(METADATA_KEY)
        try:
            return Decoder.from_json(text) if text else None
        except ValueError as error:
            raise _damaged(self.name, METADATA_KEY, error) from error

    def nodes(self) -> Iterator[ir.Node]:
        """The nodes of the main graph, in topological order."""
        return iter(self.model.graph)

    @property
    def input_names(self) -> list[str]:
        return [str(v.name) for v in self.model.graph.inputs]

    @property
    def output_names(self) -> list[str]:
        return [str(v.name) for v in self.model.graph.outputs]

    def digest(self) -> str:
        """A hash of structure, function bodies, decoder signature and weights: equal graphs compute the same function.

        Node names are included (claims use them); docs, notes and other metadata are not. Saving and opening again
        keeps the digest. Weights are represented by `weights_hash`; if that is empty, they are read.
        """
        return digest(self.model, self.weights_hash)

    def check(self) -> None:
        """Run ONNX's checker and strict shape inference over the graph, without reading weights.

        Raises:
            onnx.checker.ValidationError, onnx.shape_inference.InferenceError: the graph is not valid ONNX.
        """
        import onnx

        onnx.checker.check_model(self.structure(), full_check=True)

    def structure(self) -> Any:
        """The graph as an `onnx.ModelProto` whose weights are inputs, so that no weight is read."""
        import onnx

        graph = self.model.graph
        small: dict[str, ir.Value] = {}
        large: list[ir.Value] = []
        for name, value in graph.initializers.items():
            tensor = value.const_value
            assert tensor is not None
            if tensor.nbytes <= SMALL and not isinstance(tensor, ir.LazyTensor):
                small[name] = value
            else:
                large.append(value)
        proto = onnx.ModelProto(ir_version=self.model.ir_version, producer_name=PRODUCER)
        for domain, version in graph.opset_imports.items():
            proto.opset_import.add(domain=domain, version=version)
        proto.functions.extend(ir.to_proto(f) for f in self.model.functions.values())
        proto.graph.name = self.name
        proto.graph.node.extend(ir.to_proto(n) for n in self.nodes())
        proto.graph.input.extend(ir.to_proto(v) for v in graph.inputs)
        proto.graph.input.extend(ir.to_proto(v) for v in large)
        proto.graph.output.extend(ir.to_proto(v) for v in graph.outputs)
        for name, value in small.items():
            assert value.const_value is not None
            tensor_proto = ir.to_proto(value.const_value)
            tensor_proto.name = name
            proto.graph.initializer.append(tensor_proto)
        return proto

    def save(self, path: Path) -> None:
        """Write the graph as an ONNX file, with its weights in `<name>.data` next to it."""
        model = self.model.clone()  # the file's metadata must not show up in the model, which others may be reading
        model.metadata_props["transom.weights_hash"] = self.weights_hash
        model.metadata_props[_NOTES] = json.dumps(self.notes)
        ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=SMALL)

    @classmethod
    def open(cls, path: Path) -> Graph:
        """Read a graph that `save` wrote. Weights are memory-mapped.

        Raises:
            SourceError: the file is missing or is not an ONNX model, or its metadata is damaged.
        """
        try:
            model = ir.load(path)
        except Exception as e:  # onnx_ir and protobuf raise many types; all mean the same to the user
            raise SourceError(f"{path} cannot be read as an ONNX graph: {e}", "Write it again") from e
        props = model.metadata_props
        try:
            notes = from_json(list[str], props.get(_NOTES, "[]"))
        except WrongType as error:
            raise _damaged(str(path), _NOTES, error) from error
        return cls(model, weights_hash=props.get("transom.weights_hash", ""), notes=notes)


def _damaged(graph: str, key: str, error: ValueError) -> SourceError:
    return SourceError(f"The metadata {key} of the ONNX graph {graph} is damaged: {error}", "Write the file again")
