"""Edits an existing graph: a `GraphBuilder` that writes into it and replaces values at their uses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, TopologicalSortPass

from transom.graph.builder import GraphBuilder
from transom.graph.shapes import infer_node


class Editor(GraphBuilder):
    """Appends new nodes to the graph; `finish_edit` restores a topological order."""

    def __init__(self, model: ir.Model) -> None:
        super().__init__(model.graph.name or "model")
        self.model = model
        self.graph = model.graph
        self.functions = model.functions
        self._taken: set[str] = set()
        self._refresh()

    def _refresh(self) -> None:
        self._constants.clear()
        self._weights.clear()
        self._shared.clear()
        model = self.model
        self._taken = {str(n.name) for n in all_nodes(model.graph)} | {str(v.name) for v in all_values(model.graph)}

    def _name(self, base: str) -> str:
        full, number = ".".join([*self._scope, base]), 0
        name = full
        while name in self._taken:
            number += 1
            name = f"{full}_{number}"
        self._taken.add(name)
        return name

    def nodes(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        outputs: int = 1,
        domain: str = "",
        name: str | None = None,
        **attributes: Any,
    ) -> tuple[ir.Value, ...]:
        values = super().nodes(op_type, *inputs, outputs=outputs, domain=domain, name=name, **attributes)
        node = values[0].producer()
        assert node is not None
        infer_node(node)
        return values

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Use `new` wherever `old` was used; a graph output keeps its name. `new` must not be computed from `old`."""
        if old.is_graph_output():
            name = str(old.name)
            if new.producer() is None or new.is_graph_output():
                new = self.op("Identity", new, name=f"{name}.copy")
            old.name = self._name(f"{name}.replaced")
            new.name = name
            old.replace_all_uses_with(new, replace_graph_outputs=True)
        else:
            old.replace_all_uses_with(new)

    def remove(self, node: ir.Node) -> None:
        """Remove a node whose outputs are unused."""
        parent = node.graph
        assert parent is not None
        parent.remove(node, safe=True)

    def finish_edit(self) -> None:
        """Remove nodes that no output depends on, and sort the rest topologically."""
        RemoveUnusedNodesPass()(self.model)
        TopologicalSortPass()(self.model)
        self._refresh()


def all_nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    """The nodes of a graph and of its nodes' subgraphs; a node comes before the nodes of its subgraphs."""
    for node in graph:
        yield node
        for inner in subgraphs(node):
            yield from all_nodes(inner)


def all_values(graph: ir.Graph) -> Iterator[ir.Value]:
    """Inputs, initializers and node outputs of a graph and of its nodes' subgraphs."""
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs
        for inner in subgraphs(node):
            yield from all_values(inner)


def subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """The graphs among a node's attributes (If, Loop, Scan)."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()
