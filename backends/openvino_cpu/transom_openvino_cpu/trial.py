"""Tries to lower a graph before its nodes are claimed, so that every claimed node can be compiled.

There are two ways. A graph is lowered node by node if OpenVINO takes every node alone. A standard ONNX graph with
control flow, or with a node that OpenVINO reads only where it sees the rest of the graph (axes that other nodes
compute), is read as a whole.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from transom.errors import EngineError, message_lines
from transom.graph.bodies import has_body
from transom_openvino_cpu.frontend import CONTROL_FLOW, blamed_operators, read_whole, unknown_rank

if TYPE_CHECKING:
    import onnx_ir as ir

    from transom.graph import Graph
    from transom_openvino_cpu.precision import CpuPrecision


def standard(graph: Graph) -> bool:
    """Whether every node is one of ONNX's own operators."""
    return all(n.domain in ("", "ai.onnx") for n in graph.nodes())


def whole_through_frontend(graph: Graph) -> bool:
    """Whether only OpenVINO's frontend can read the graph: it has control flow, and standard operators only."""
    return standard(graph) and any(n.op_type in CONTROL_FLOW for n in graph.nodes())


def refused_alone(
    graph: Graph, precision: CpuPrecision, known: Mapping[str, str] = MappingProxyType({})
) -> dict[str, str]:
    """Node -> why OpenVINO cannot compile it. Nodes behind it are judged by the declared type and shape of its outputs.

    The graph is not a decoder: its weights become constants, which would take a large one's memory twice.
    """
    from transom_openvino_cpu.lowering import StageWriter
    from transom_openvino_cpu.stages import cut

    (part,) = cut(graph, precision, tables_apart=False)
    writer = StageWriter(graph, part, precision, {}, in_pages=False)
    refused: dict[str, str] = {}
    for node in part.nodes:
        if node.name in known:
            writer.assume(node)
            continue
        try:
            writer.lower(node)
            reason = next((r for v, o in _pairs(node, writer.lowered(node)) if (r := _differs(v, o))), "")
        except EngineError as e:
            reason = e.cause
        except (RuntimeError, ValueError, TypeError, LookupError, NotImplementedError) as e:
            reason = f"OpenVINO cannot build it: {message_lines(e)[-1]}"
        if reason:
            refused[str(node.name)] = reason
            writer.assume(node)
    return refused


def _pairs(node: ir.Node, outputs: list[Any]) -> list[tuple[ir.Value, Any]]:
    used = [v for v in node.outputs if v.uses() or v.is_graph_output()]
    return list(zip(used, outputs, strict=True))


def _differs(value: ir.Value, lowered: Any) -> str:
    """How the type or shape that OpenVINO computes for a value contradicts ONNX's; empty if it does not."""
    from transom_openvino_cpu.lowering import element_type_of

    if unknown_rank(lowered):
        return f"OpenVINO does not know the number of axes of {value.name} before it is computed"
    shape = lowered.get_partial_shape()
    if value.shape is not None:
        if len(value.shape) != len(shape):
            return f"OpenVINO computes {value.name} with {len(shape)} axes, and ONNX says {len(value.shape)}"
        for mine, theirs in zip(value.shape, shape, strict=True):
            if isinstance(mine, int) and theirs.is_static and mine != theirs.get_length():
                return f"OpenVINO computes {value.name} with the shape {shape}, and ONNX says {list(value.shape)}"
    if value.dtype is not None and lowered.get_element_type() != element_type_of(value):
        return f"OpenVINO computes {value.name} in {lowered.get_element_type().to_string()}, ONNX in {value.dtype.name}"
    return ""


_ALONE = frozenset({"RotaryEmbedding"})
"""Operators that the frontend computes wrong, and this backend right: never read as part of a whole graph."""


def refusals(graph: Graph, precision: CpuPrecision, known: Mapping[str, str]) -> Mapping[str, str]:
    """Node -> why it cannot be compiled, beside the nodes that are `known` to be refused. Empty if the graph can be
    lowered in one of the two ways, or if known nodes have bodies in simpler operators, which come first."""
    if graph.decoder is not None or any(n.name in known and has_body(graph.model, n) for n in graph.nodes()):
        return {}
    if whole_through_frontend(graph):
        return {} if known else _refused_whole(graph)
    alone = refused_alone(graph, precision, known)
    if not alone or known or not standard(graph):
        return alone
    if apart := [n for n in graph.nodes() if n.op_type in _ALONE]:
        return {str(n.name): "OpenVINO's frontend computes it wrong where it reads the whole graph" for n in apart}
    return alone if _refused_whole(graph) else {}


def _refused_whole(graph: Graph) -> dict[str, str]:
    """Node -> why OpenVINO cannot read the graph as a whole."""
    nodes = list(graph.nodes())
    with tempfile.TemporaryDirectory(prefix="transom-openvino-") as folder:
        try:
            model = read_whole(graph, Path(folder))
        except EngineError as e:
            blamed = blamed_operators(e)
            guilty = [n for n in nodes if n.op_type in blamed]
            inner = [n for n in nodes if n.op_type in CONTROL_FLOW]
            return {str(n.name): e.cause for n in guilty or inner or nodes}
        refused: dict[str, str] = {}
        for made in model.get_ordered_ops():
            if any(unknown_rank(o) for o in made.outputs()):
                name = made.get_friendly_name()
                found = [n for n in nodes if n.name == name or any(v.name == name for v in n.outputs)]
                for node in found or nodes[-1:]:
                    reason = f"OpenVINO does not know the number of axes of {name} before it is computed"
                    refused[str(node.name)] = reason
        for value, result in zip(graph.model.graph.outputs, model.get_results(), strict=True):
            if (reason := _differs(value, result.input_value(0))) and not refused:
                node = value.producer() or nodes[-1]
                refused[str(node.name)] = reason
        del model
    return refused
