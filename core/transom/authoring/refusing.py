"""Reasons for a backend that accepts a decoder only as a whole to refuse a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from transom.errors import UnsupportedError
from transom.graph.sparse import is_attention
from transom.programs.reading import UnsupportedNode

if TYPE_CHECKING:
    from transom.graph import Graph


class NoAttention(Exception):
    """The engine cannot run the attention nodes of the graph; the message says why."""


def refusals(graph: Graph, read: Callable[[], object]) -> dict[str, str]:
    """Reasons for refusal, by the name of the refused node; empty if the graph is claimed.

    Args:
        read: reads the decoder as the backend does; raises UnsupportedNode, NoAttention or UnsupportedError if it
            cannot.
    """
    if graph.decoder is None:
        return {str(node.name): "runs decoders only, and this graph has no cache" for node in graph.nodes()}
    try:
        read()
    except UnsupportedNode as e:
        return {str(e.node.name): e.reason}
    except NoAttention as e:
        return {str(node.name): str(e) for node in graph.nodes() if is_attention(node)}
    except UnsupportedError as e:
        return {str(next(iter(graph.nodes())).name): e.cause}
    return {}
