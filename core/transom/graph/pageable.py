"""Whether an engine can keep a decoder graph's cache outside the graph, in pages of its own."""

from __future__ import annotations

import onnx_ir as ir

from transom.graph.graph import Graph
from transom.signature import cache_input_names, cache_output_names


def unpageable_reason(graph: Graph, node: ir.Node) -> str:
    """Why this attention's cache cannot be kept in pages; empty if it can."""
    decoder = graph.decoder
    layer = node.attributes.get_int("layer", 0)
    if decoder is None or layer >= len(decoder.layers):
        return "the cache is not an input of a decoder graph, so it cannot be kept in pages"
    wired = [None if v is None else v.name for v in node.inputs]
    if tuple(wired[3:5]) != cache_input_names(layer) or wired[5:7] != ["sequences", "positions"]:
        return "the cache or the positions are computed in the graph, so they cannot be kept in pages"
    outputs = {str(v.name) for v in graph.model.graph.outputs}
    for value, wanted in zip(node.outputs[1:], cache_output_names(layer), strict=False):
        if value.uses() or (value.name != wanted and value.name in outputs):
            return "the cache is read again in the graph"
    return ""
