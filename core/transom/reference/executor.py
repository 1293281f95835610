"""Runs a neutral graph in NumPy, exactly, node by node. Every backend is compared with it.

Weights are read when their node runs and released afterwards, so that a model needs only the memory of its largest
layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from transom.errors import UnsupportedError
from transom.graph import Graph
from transom.graph.passes import inline_functions
from transom.graph.reading import attributes_of, element_type, weight_of
from transom.graph.weights import DENSE_DTYPES, Dense, dequantize
from transom.ops import Array, find

Values = dict[int, Any]
Adjust = Callable[[ir.Node, dict[str, Any]], None]
Observe = Callable[[ir.Node, Sequence[Any], Sequence[Any]], None]

CONTROL = ("If", "Loop")
CACHED_BYTES = 1 << 16
"""Values computed from constants are cached up to this many bytes: recomputing a chain of them can be exponential."""
_RANDOM = {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
_SEQUENCES = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def unsupported_reason(node: ir.Node) -> str:
    """Why the node cannot run in NumPy, with the name of the inner node if the cause is in a subgraph; empty if it
    can."""
    if not node.domain and node.op_type in CONTROL:
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                for inner in attribute.as_graph():
                    if reason := unsupported_reason(inner):
                        return f"{reason} (node {inner.name} in {attribute.name})"
        return ""
    operator = f"{node.domain or 'ai.onnx'}::{node.op_type}"
    if find(node.domain, node.op_type) is None:
        return f"no NumPy reference for {operator}"
    if any(a.type in _SEQUENCES for a in node.attributes.values()):
        return f"{operator} has a subgraph; only If and Loop are supported"
    return ""


class Executor:
    """A graph prepared for running in NumPy.

    Args:
        graph: any valid neutral graph; model-local functions of unregistered operators are inlined first.
        keep_weights: keep dequantized weights between runs (fast, as large as float32) instead of streaming them.

    Raises:
        UnsupportedError: an operator has no reference; the message names it and its node.
    """

    def __init__(self, graph: Graph, *, keep_weights: bool = False) -> None:
        if any(find(f.domain, f.name) is None for f in graph.model.functions.values()):
            graph = inline_functions(graph)
        self.graph = graph
        self._keep = keep_weights
        self._adjust: Adjust | None = None
        self._observe: Observe | None = None
        self._cache: dict[int, Array] = {}
        for node in graph.nodes():
            if reason := unsupported_reason(node):
                raise UnsupportedError(
                    f"the node {node.name} cannot run on the reference: {reason}",
                    "Register the operator through the hook transom_ops, or give the model a function body for it",
                )
        self._constant = self._constant_nodes()
        self._last_use = self._lifetimes()

    def _constant_nodes(self) -> set[int]:
        """Nodes that depend only on weights. They run when a consumer needs them; large results are not kept."""
        found: set[int] = set()
        for node in self.graph.nodes():
            if node.op_type in CONTROL or node.op_type in _RANDOM or (not node.inputs and node.op_type != "Constant"):
                continue
            if all(_fixed(v, found) for v in node.inputs):
                found.add(id(node))
        return found

    def _lifetimes(self) -> dict[int, int]:
        last: dict[int, int] = {}
        for index, node in enumerate(self.graph.nodes()):
            for value in _reads(node):
                last[id(value)] = index
        for value in self.graph.model.graph.outputs:
            last[id(value)] = -1
        return last

    def run(
        self,
        inputs: Mapping[str, Any],
        *,
        progress: Callable[[float], None] | None = None,
        adjust: Adjust | None = None,
        observe: Observe | None = None,
    ) -> dict[str, Array]:
        """Compute all outputs, by name. They belong to the caller and alias neither weights nor inputs.

        Args:
            adjust: called with each node and its attributes before the node runs; may change them for this run.
            observe: called with each node, its inputs (None if absent) and its outputs after the node ran. Includes
                nodes in subgraphs and nodes that prepare weights, but not a Gather from a table of weights. Must not
                change or keep the arrays.

        Raises:
            ValueError: an input is missing, unknown or of the wrong element type; the message names it.
        """
        graph = self.graph.model.graph
        names = {str(v.name) for v in graph.inputs}
        if missing := names - set(inputs):
            raise ValueError(f"missing inputs: {', '.join(sorted(missing))}")
        if unknown := set(inputs) - names:
            raise ValueError(f"unknown inputs: {', '.join(sorted(unknown))}")
        values: Values = {id(v): _as_array(inputs[str(v.name)], v) for v in graph.inputs}
        count = len(graph)
        self._adjust, self._observe = adjust, observe
        for index, node in enumerate(graph):
            if id(node) not in self._constant:
                self._execute(node, values)
            for value in _reads(node):
                if self._last_use.get(id(value)) == index:
                    values.pop(id(value), None)
            if progress is not None:
                progress((index + 1) / count)
        return {str(v.name): self._owned(v, values) for v in graph.outputs}

    def _owned(self, value: ir.Value, values: Values) -> Any:
        array = self._value(value, values)
        shared = value.is_graph_input() or value.is_initializer() or id(value) in self._cache
        if isinstance(array, np.ndarray) and (shared or array.base is not None):
            return array.copy()
        return array

    def _value(self, value: ir.Value | None, values: Values) -> Any:
        if value is None:
            return None
        if id(value) in values:
            return values[id(value)]
        if id(value) in self._cache:
            return self._cache[id(value)]
        if value.const_value is not None:
            array = value.const_value.numpy()
        else:
            node = value.producer()
            if node is None or id(node) not in self._constant:
                raise ValueError(f"the value {value.name} is read before it is computed")
            local: Values = {}
            self._execute(node, local)
            array = local[id(value)]
        if self._keep or (value.const_value is None and getattr(array, "nbytes", CACHED_BYTES + 1) <= CACHED_BYTES):
            self._cache[id(value)] = array
        return array

    def _execute(self, node: ir.Node, values: Values) -> None:
        if not node.domain and node.op_type in CONTROL:
            self._control(node, values)
            return
        if node.op_type == "Gather" and not node.domain and not self._keep and _fixed(node.inputs[0], self._constant):
            weight, axis = weight_of(node.inputs[0]), node.attributes.get_int("axis", 0)
            dtype = element_type(node.inputs[0])
            same = isinstance(weight, Dense) and dtype == ir.DataType.from_numpy(DENSE_DTYPES[weight.dtype])
            if weight is not None and dtype is not None and axis == 0 and (dtype == ir.DataType.FLOAT or same):
                # read only these rows of an embedding table
                ids = np.asarray(self._value(node.inputs[1], values))
                rows = dequantize(weight, ids.reshape(-1)).astype(dtype.numpy(), copy=False)
                values[id(node.outputs[0])] = rows.reshape(*ids.shape, *weight.shape[1:])
                return
        schema = find(node.domain, node.op_type)
        assert schema is not None
        attributes = attributes_of(node)
        attributes["__outputs__"] = len(node.outputs)
        if self._adjust is not None:
            self._adjust(node, attributes)
        arguments = [self._value(v, values) for v in node.inputs]
        try:
            results = schema.reference(arguments, attributes)
        except (ValueError, IndexError, TypeError, KeyError) as e:
            raise ValueError(f"node {node.name} ({node.op_type}): {e}") from e
        if self._observe is not None:
            self._observe(node, arguments, results)
        for value, array in zip(node.outputs, results, strict=False):
            values[id(value)] = array

    def _control(self, node: ir.Node, values: Values) -> None:
        if node.op_type == "If":
            branch = "then_branch" if bool(np.all(self._value(node.inputs[0], values))) else "else_branch"
            body = node.attributes[branch].as_graph()
            outputs = self._subgraph(body, [], values)
        else:
            outputs = self._loop(node, values)
        for value, array in zip(node.outputs, outputs, strict=False):
            values[id(value)] = array

    def _loop(self, node: ir.Node, values: Values) -> list[Any]:
        limit, condition, *carried = (self._value(v, values) for v in node.inputs)
        body = node.attributes["body"].as_graph()
        kept = len(carried)
        scans: list[list[Any]] = [[] for _ in range(len(node.outputs) - kept)]
        index, going = 0, condition is None or bool(np.all(condition))
        while going and (limit is None or index < int(np.asarray(limit).reshape(-1)[0])):
            going_value, *rest = self._subgraph(
                body, [np.asarray(np.int64(index)), np.asarray(going), *carried], values
            )
            going, carried = bool(np.all(going_value)), rest[:kept]
            for scan, item in zip(scans, rest[kept:], strict=True):
                scan.append(item)
            index += 1
        return [
            *carried,
            *(np.stack(s) if s else _empty_scan(v) for s, v in zip(scans, body.outputs[kept + 1 :], strict=True)),
        ]

    def _subgraph(self, body: ir.Graph, inputs: Sequence[Any], outer: Values) -> list[Any]:
        values = dict(outer)
        for value, array in zip(body.inputs, inputs, strict=True):
            values[id(value)] = array
        for node in body:
            self._execute(node, values)
        return [self._value(v, values) for v in body.outputs]


def _as_array(given: Any, value: ir.Value) -> Array:
    """The input as a NumPy array (from the array protocol or DLPack) of the graph's element type."""
    if not hasattr(given, "__array__") and hasattr(given, "__dlpack__"):
        given = np.from_dlpack(given)
    array = np.asarray(given)
    if value.dtype is None:
        return array
    wanted = value.dtype.numpy()
    if array.dtype == wanted:
        return array
    # convert within the same kind (a list of floats is float64); anything else is a mistake
    if array.dtype.kind != np.dtype(wanted).kind or array.dtype.kind not in "iuf":
        raise ValueError(f"the input {value.name} is {array.dtype}; the graph takes {wanted}")
    return array.astype(wanted)


def _empty_scan(value: ir.Value) -> Array:
    """The scan output of a loop that never ran: zero entries of this type and shape."""
    dims = [] if value.shape is None else [d if isinstance(d, int) else 0 for d in value.shape]
    return np.zeros((0, *dims), np.float32 if value.dtype is None else value.dtype.numpy())


def _fixed(value: ir.Value | None, constant_nodes: set[int]) -> bool:
    if value is None or value.const_value is not None:
        return True
    node = value.producer()
    return node is not None and id(node) in constant_nodes


def _reads(node: ir.Node) -> list[ir.Value]:
    """The values that a node reads, including those read by its subgraphs."""
    reads = [v for v in node.inputs if v is not None]
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.as_graph():
                reads += _reads(inner)
            reads += list(attribute.as_graph().outputs)
    return reads
