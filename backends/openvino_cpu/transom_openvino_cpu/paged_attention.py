"""Which graphs OpenVINO's PagedAttention can run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transom.graph.pageable import unpageable_reason
from transom.graph.sparse import is_attention

if TYPE_CHECKING:
    import onnx_ir as ir

    from transom.graph import Graph


def paged(graph: Graph) -> bool:
    """Whether OpenVINO's PagedAttention runs every layer."""
    nodes = [n for n in graph.nodes() if is_attention(n)]
    return bool(nodes) and all(no_paged_attention(graph, n) == "" for n in nodes)


def no_paged_attention(graph: Graph, node: ir.Node) -> str:
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
