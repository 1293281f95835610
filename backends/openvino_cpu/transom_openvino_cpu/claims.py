"""Which nodes the backend claims, and the reasons for refusing the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from transom.contract import Claim
from transom.graph.reading import linear_weight, vocabulary_products
from transom.graph.sparse import is_attention
from transom_openvino_cpu.paged_attention import no_paged_attention

if TYPE_CHECKING:
    import onnx_ir as ir

    from transom.contract import Device
    from transom.graph import Graph
    from transom_openvino_cpu.precision import CpuPrecision


def claims(graph: Graph, precision: CpuPrecision, device: Device) -> Iterator[Claim]:
    """One claim for each node, in order."""
    from transom_openvino_cpu.native.choosing import read_native
    from transom_openvino_cpu.precision import form_of

    heads = vocabulary_products(graph)
    """Never requantized."""
    expected = precision.divergence(graph.decoder.family) if graph.decoder is not None else None
    if not isinstance(read_native(graph, precision, device), str):
        for node in graph.nodes():
            inexact = precision.dynamic and linear_weight(node) is not None and str(node.name) not in heads
            yield Claim(str(node.name), True, exact=not inexact, divergence=expected if inexact else None)
        return
    refusals = openvino_refusals(graph, precision)
    for node in graph.nodes():
        name = str(node.name)
        if name in refusals:
            yield Claim(name, False, refusals[name])
            continue
        weight = linear_weight(node) if precision.dynamic else None
        quantized = weight is not None and form_of(weight, precision).group >= 32 and str(node.name) not in heads
        yield Claim(name, True, exact=not quantized, divergence=expected if quantized else None)


def openvino_refusals(graph: Graph, precision: CpuPrecision) -> dict[str, str]:
    """Node -> why OpenVINO cannot run it, without the native library; empty if it runs the graph."""
    from transom_openvino_cpu.integers import integers
    from transom_openvino_cpu.trial import refusals as tried
    from transom_openvino_cpu.trial import whole_through_frontend

    attention = [n for n in graph.nodes() if is_attention(n)]
    refused = {str(n.name): r for n in attention if (r := no_paged_attention(graph, n))}
    if refused:  # attention is paged in all layers or in none
        first = next(n for n in attention if str(n.name) in refused)
        because = f"{refused[str(first.name)]} (layer {_layer(first)})"
        refused |= {str(n.name): because for n in attention if str(n.name) not in refused}
    whole = whole_through_frontend(graph)
    refused |= {str(n.name): r for n in graph.nodes() if not is_attention(n) and (r := _refusal(n, whole))}
    if graph.decoder is None:  # a decoder's ids and positions are small
        refused = integers(graph).refused | refused
    return {**refused, **tried(graph, precision, refused)}


def _layer(node: ir.Node) -> int:
    return node.attributes.get_int("layer", 0)


def _refusal(node: ir.Node, whole: bool) -> str:
    """Why a node other than cached attention cannot run; empty if it can."""
    from transom_openvino_cpu.differences import difference
    from transom_openvino_cpu.frontend import CONTROL_FLOW, OPERATORS
    from transom_openvino_cpu.operators import ELEMENT_TYPES, TABLE

    if node.domain not in ("", "ai.onnx"):
        return f"no OpenVINO form of {node.domain}::{node.op_type}"
    if node.op_type in CONTROL_FLOW:
        if not whole:
            return "control flow in a graph with operators that are not standard ONNX"
        stale = any(_may_collect_nothing(inner) for inner in _with_inner(node))
        if stale:
            return "OpenVINO's Loop returns the values of the run before if it runs zero iterations"
        return next((r for inner in _with_inner(node) if (r := difference(inner))), "")
    if node.op_type not in TABLE and node.op_type not in OPERATORS:
        return f"no OpenVINO form of {node.op_type}"
    if node.op_type == "Cast":
        to = node.attributes.get_int("to", 0)
        if to != 16 and to not in ELEMENT_TYPES:
            return f"no OpenVINO form of a cast to ONNX type {to}"
    return difference(node)


def _with_inner(node: ir.Node) -> Iterator[ir.Node]:
    """The node and all nodes of its subgraphs."""
    from transom.graph.editing import all_nodes, subgraphs

    yield node
    for graph in subgraphs(node):
        yield from all_nodes(graph)


def _may_collect_nothing(node: ir.Node) -> bool:
    """Whether it is a Loop with scan outputs that may run zero iterations.

    OpenVINO 2026.4 then returns the scan outputs of the run before; loop-carried values are correct.
    """
    from transom.graph.reading import constant_of

    carried = len(node.inputs) - 2
    if node.op_type != "Loop" or node.domain or len(node.outputs) <= carried:
        return False
    for value in node.inputs[:2]:  # trip count and condition; an absent one does not end the loop
        if value is not None and not ((known := constant_of(value)) is not None and known.reshape(-1)[0] >= 1):
            return True
    return False
