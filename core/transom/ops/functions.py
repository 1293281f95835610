"""Writes function bodies: a custom operator (Transom's or a third party's) as an ONNX function in standard operators.

A body is specialized to a node's attributes and to the optional inputs present. The function's `overload`, a digest of
both, identifies the specialization (ONNX IR version 10 and later).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from transom.ops.schema import Attribute

OPSET = 24
"""The version of ONNX's own operators in every neutral graph and every function body."""

_ATTRIBUTE_TYPES = {
    "int": ir.AttributeType.INT,
    "float": ir.AttributeType.FLOAT,
    "string": ir.AttributeType.STRING,
    "ints": ir.AttributeType.INTS,
    "floats": ir.AttributeType.FLOATS,
    "strings": ir.AttributeType.STRINGS,
}


def overload(attributes: Mapping[str, Any], present: Sequence[bool]) -> str:
    """The name of a specialization. It excludes the layer index, so that equal layers share one body."""
    form = {k: v for k, v in sorted(attributes.items()) if k != "layer"}
    text = json.dumps([form, [bool(p) for p in present]], sort_keys=True)
    return "v" + hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


class FunctionWriter:
    """Collects the nodes of one function. Call it with an operator and its inputs to get the output value."""

    def __init__(self, domain: str, name: str, inputs: Sequence[str]) -> None:
        self.domain, self.name = domain, name
        self.inputs = [ir.Value(name=n) for n in inputs]
        self._nodes: list[ir.Node] = []

    def __call__(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Append a standard operator with one output."""
        return self.several(1, op_type, *inputs, **attributes)[0]

    def several(self, outputs: int, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> Sequence[ir.Value]:
        """Append a standard operator with this many outputs."""
        number = len(self._nodes)
        node = ir.Node(
            "",
            op_type,
            inputs,
            [ir.convenience.convert_attribute(k, v) for k, v in attributes.items()],
            name=f"{op_type}_{number}",
            num_outputs=outputs,
        )
        for i, value in enumerate(node.outputs):
            value.name = f"{op_type.lower()}_{number}" if i == 0 else f"{op_type.lower()}_{number}_{i}"
        self._nodes.append(node)
        return node.outputs

    def ints(self, value: int | Sequence[int]) -> ir.Value:
        """An int64 constant."""
        return self("Constant", value=ir.tensor(np.array(value, np.int64)))

    def floats(self, value: float | Sequence[float]) -> ir.Value:
        """A float32 constant."""
        return self("Constant", value=ir.tensor(np.array(value, np.float32)))

    def finish(
        self,
        outputs: Sequence[ir.Value],
        formal: Sequence[Attribute],
        attributes: Mapping[str, Any],
        present: Sequence[bool],
    ) -> ir.Function:
        """The function. It declares every formal attribute, although the body is specialized to their values."""
        graph = ir.Graph(self.inputs, outputs, nodes=self._nodes, opset_imports={"": OPSET}, name=self.name)
        declared = [
            ir.Attr(a.name, _ATTRIBUTE_TYPES[a.type], None)
            if a.default is None
            else ir.convenience.convert_attribute(a.name, a.default, _ATTRIBUTE_TYPES[a.type])
            for a in formal
        ]
        return ir.Function(
            self.domain, self.name, overload=overload(attributes, present), graph=graph, attributes=declared
        )
