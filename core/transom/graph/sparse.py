"""Writes a sparsity policy into a graph, as the attribute `sparsity` of its attention nodes."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir

from transom.errors import OptionError, option
from transom.graph.graph import Graph
from transom.graph.reading import attributes_of
from transom.ops import find
from transom.ops.functions import overload
from transom.sparsity import Sparsity

DOMAIN, NAME = "transom", "CachedAttention"


def is_attention(node: ir.Node) -> bool:
    """Whether sparsity policies apply to this operator."""
    return node.domain == DOMAIN and node.op_type == NAME


def dense_reason(node: ir.Node) -> str:
    """Why an attention node has to stay dense; empty if a policy can be applied to it."""
    if len(node.inputs) > 9 and node.inputs[9] is not None:
        return "a bias on its scores"
    if not node.attributes.get_int("is_causal", 1):
        return "no causal mask"
    return ""


def with_sparsity(graph: Graph, policy: Sparsity) -> Graph:
    """The graph with its layer's part of the policy in each attention node that supports one.

    The notes say why nodes stay dense. With a dense policy, the same graph is returned.

    Raises:
        OptionError: the graph has no attention over a cache, or the policy's heads are those of another model.
    """
    if policy.dense:
        return graph
    nodes = [n for n in graph.nodes() if is_attention(n)]
    if not nodes:
        raise OptionError(
            f"{graph.name} has no attention over a cache that a sparsity policy could be applied to",
            f"Load it with {option('sparsity', 'off')}",
        )
    if graph.decoder is not None:
        policy.for_model(graph.decoder)
    dense = Counter(reason for n in nodes if (reason := dense_reason(n)))
    schema = find(DOMAIN, NAME)
    assert schema is not None
    assert schema.body is not None
    model = graph.model.clone()
    for node in model.graph:
        if not is_attention(node) or dense_reason(node):
            continue
        text = policy.layer(node.attributes.get_int("layer", 0)).to_string()
        node.attributes["sparsity"] = ir.AttrString("sparsity", text)
        attributes = attributes_of(node)
        present = tuple(v is not None for v in node.inputs)
        node.overload = overload(attributes, present)
        if node.op_identifier() not in model.functions:
            model.functions[node.op_identifier()] = schema.body(attributes, present)
    used = {n.op_identifier() for n in model.graph.all_nodes()}
    used |= {n.op_identifier() for f in model.functions.values() for n in f.all_nodes()}
    for identifier in [i for i in model.functions if i[:2] == (DOMAIN, NAME) and i not in used]:
        del model.functions[identifier]
    notes = [f"{count} attention nodes stay dense: {reason}" for reason, count in dense.items()]
    return Graph(model, weights_hash=graph.weights_hash, notes=[*graph.notes, *notes])
