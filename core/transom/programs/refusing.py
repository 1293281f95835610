"""Why a backend that takes decoders whole, or not at all, does not take a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from transom.errors import UnsupportedError
from transom.programs.drafting import NoForm

if TYPE_CHECKING:
    from transom.graph import Graph


def refusals(graph: Graph, draft: Callable[[], object]) -> dict[str, str]:
    """Reasons by the names of the nodes that are not claimed; empty for a graph that is taken.

    Args:
        draft: reads the decoder as the backend would, and raises NoForm or UnsupportedError where it cannot.
    """
    if graph.decoder is None:
        return {str(node.name): "runs decoders only, and this graph has no cache" for node in graph.nodes()}
    try:
        draft()
    except NoForm as e:
        return {str(e.node.name): e.reason}
    except UnsupportedError as e:
        return {str(next(iter(graph.nodes())).name): e.cause}
    return {}
