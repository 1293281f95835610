"""Which nodes the backend claims, and the reasons for refusing the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from transom.contract import Claim
from transom.graph.pageable import unpageable_reason
from transom.graph.reading import element_type, linear_weight, vocabulary_products
from transom.graph.sparse import is_attention

if TYPE_CHECKING:
    import onnx_ir as ir

    from transom.contract import Device
    from transom.graph import Graph
    from transom_openvino_cpu.precision import CpuPrecision


def paged(graph: Graph) -> bool:
    """Whether OpenVINO's PagedAttention runs every layer."""
    nodes = [n for n in graph.nodes() if is_attention(n)]
    return bool(nodes) and all(_no_paged_attention(graph, n) == "" for n in nodes)


def claims(graph: Graph, precision: CpuPrecision, device: Device) -> Iterator[Claim]:
    """One claim for each node, in order."""
    from transom_openvino_cpu.native.choosing import read_native
    from transom_openvino_cpu.precision import form_of

    heads = vocabulary_products(graph)
    """Never requantized."""
    if not isinstance(read_native(graph, precision, device), str):
        for node in graph.nodes():
            inexact = precision.dynamic and linear_weight(node) is not None and str(node.name) not in heads
            yield Claim(str(node.name), True, exact=not inexact)
        return
    attention = [n for n in graph.nodes() if is_attention(n)]
    refused = next((f"{r} (layer {_layer(n)})" for n in attention if (r := _no_paged_attention(graph, n))), "")
    whole = whole_through_frontend(graph)
    for node in graph.nodes():
        name = str(node.name)
        if is_attention(node):
            reason = _no_paged_attention(graph, node) or refused
            yield Claim(name, not reason, reason)
            continue
        reason = _refusal(node, whole)
        if reason:
            yield Claim(name, False, reason)
            continue
        weight = linear_weight(node) if precision.dynamic else None
        quantized = weight is not None and form_of(weight, precision).group >= 32 and str(node.name) not in heads
        yield Claim(name, True, exact=not quantized)


def _layer(node: ir.Node) -> int:
    return node.attributes.get_int("layer", 0)


def _no_paged_attention(graph: Graph, node: ir.Node) -> str:
    """Why OpenVINO's PagedAttention cannot compute this attention; empty if it can."""
    if reason := unpageable_reason(graph, node):
        return reason
    if node.attributes.get_float("softcap", 0.0):
        return "OpenVINO's PagedAttention has no soft cap on the scores"
    if len(node.inputs) > 9 and node.inputs[9] is not None:
        return "OpenVINO's PagedAttention takes no additive bias"
    if not node.attributes.get_int("is_causal", 1):
        return "OpenVINO's PagedAttention is causal"
    sparsity = node.attributes.get_string("sparsity", "dense")
    if sparsity != "dense":
        return f"OpenVINO's PagedAttention has no sparsity policy {sparsity!r}"
    return ""


def _refusal(node: ir.Node, whole: bool) -> str:
    """Why a node other than cached attention cannot run; empty if it can."""
    from transom_openvino_cpu.frontend import CONTROL_FLOW, OPERATORS
    from transom_openvino_cpu.operators import ELEMENT_TYPES, TABLE

    if node.domain not in ("", "ai.onnx"):
        return f"no OpenVINO form of {node.domain}::{node.op_type}"
    if node.op_type in CONTROL_FLOW:
        if not whole:
            return "control flow in a graph with operators that are not standard ONNX"
        stale = any(_may_collect_nothing(inner) for inner in _with_inner(node))
        return "OpenVINO's Loop returns the values of the run before if it runs zero iterations" if stale else ""
    if node.op_type not in TABLE and node.op_type not in OPERATORS:
        return f"no OpenVINO form of {node.op_type}"
    if node.op_type == "Cast":
        to = node.attributes.get_int("to", 0)
        if to != 16 and to not in ELEMENT_TYPES:
            return f"no OpenVINO form of a cast to ONNX type {to}"
    if node.op_type == "QuantizeLinear" and "FLOAT" in (kind := _code_type(node)):
        return f"OpenVINO rounds to {kind} differently from ONNX, and turns NaN into numbers"
    return ""


def _code_type(node: ir.Node) -> str:
    """ONNX's name of the output type of a QuantizeLinear."""
    import onnx_ir as ir

    zero = node.inputs[2] if len(node.inputs) > 2 else None
    declared = ir.DataType(node.attributes.get_int("output_dtype", 0))
    return (element_type(zero) or declared or ir.DataType.UINT8).name


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


def whole_through_frontend(graph: Graph) -> bool:
    """Whether OpenVINO's frontend reads the whole graph: it has control flow, and standard operators only."""
    from transom_openvino_cpu.frontend import CONTROL_FLOW

    nodes: list[Any] = list(graph.nodes())
    return any(n.op_type in CONTROL_FLOW for n in nodes) and all(n.domain in ("", "ai.onnx") for n in nodes)
