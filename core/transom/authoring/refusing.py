"""Why a backend that takes decoders whole, or not at all, does not take a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from transom.errors import UnsupportedError
from transom.graph.sparse import is_attention
from transom.programs.reading import NoForm

if TYPE_CHECKING:
    from transom.graph import Graph


class NoAttention(Exception):
    """The engine has no operator for any attention node of the graph; the message says why."""


def refusals(graph: Graph, read: Callable[[], object]) -> dict[str, str]:
    """Reasons by the names of the nodes that are not claimed; empty for a graph that is taken.

    Args:
        read: reads the decoder as the backend would, and raises NoForm, NoAttention or UnsupportedError where it
            cannot.
    """
    if graph.decoder is None:
        return {str(node.name): "runs decoders only, and this graph has no cache" for node in graph.nodes()}
    try:
        read()
    except NoForm as e:
        return {str(e.node.name): e.reason}
    except NoAttention as e:
        return {str(node.name): str(e) for node in graph.nodes() if is_attention(node)}
    except UnsupportedError as e:
        return {str(next(iter(graph.nodes())).name): e.cause}
    return {}
