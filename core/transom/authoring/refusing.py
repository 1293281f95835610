"""Reasons for a backend that accepts a decoder only as a whole to refuse a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from transom.contract import Claim
from transom.errors import UnsupportedError
from transom.graph.sparse import is_attention
from transom.programs.reading import UnsupportedNode, unsupported_nodes

if TYPE_CHECKING:
    import onnx_ir as ir

    from transom.graph import Graph
    from transom.programs.reading import Kernels
    from transom.signature import LayerCache

WHOLE = "runs decoders as a whole or not at all, and other nodes of this one are refused"


class NoAttention(Exception):
    """The engine cannot run the attention nodes of the graph; the message says why."""


def refusals(
    graph: Graph,
    kernels: Kernels,
    read: Callable[[], object],
    attention: Callable[[ir.Node, LayerCache], str] = lambda node, layer: "",
) -> dict[str, str]:
    """Reasons for refusal, by the name of the refused node; empty if the graph is claimed.

    Each node that the engine cannot run has its own reason. The others have none, although the engine does not run them
    either: see `claim`.

    Args:
        kernels: what the engine can run.
        read: reads the decoder as the backend does; raises UnsupportedNode, NoAttention or UnsupportedError if it
            cannot.
        attention: why the engine cannot compute an attention node, whatever its inputs are; empty if it can. `kernels`
            is asked besides.
    """
    if graph.decoder is None:
        return {str(node.name): "runs decoders only, and this graph has no cache" for node in graph.nodes()}
    refused = unsupported_nodes(graph, kernels)
    for node in graph.nodes():
        if is_attention(node) and (reason := attention(node, _layer(graph, node))):
            refused.setdefault(str(node.name), reason)
    if refused:
        return refused
    try:
        read()
    except UnsupportedNode as e:
        return {str(e.node.name): e.reason}
    except NoAttention as e:
        return {str(node.name): str(e) for node in graph.nodes() if is_attention(node)}
    except UnsupportedError as e:
        return {str(next(iter(graph.nodes())).name): e.cause}
    return {}


def _layer(graph: Graph, node: ir.Node) -> LayerCache:
    assert graph.decoder is not None
    return graph.decoder.layers[node.attributes.get_int("layer", 0)]


def claim(node: ir.Node, refused: Mapping[str, str]) -> Claim | None:
    """The claim of a node in a graph of which some nodes are refused: no, with its reason, or yes with the reservation
    that the rest has to run too. None if no node is refused: the backend says how it runs the node.

    The host may still decompose what is refused. It asks again then, and the reservation is gone.
    """
    if not refused:
        return None
    name = str(node.name)
    return Claim(name, False, refused[name]) if name in refused else Claim(name, True, WHOLE)
