"""The neutral graph: building, checking, reading and rewriting it.

Importing this package does not import ONNX: each name is loaded when it is first used. Sources that only describe
weights (`transom.graph.weights`), to identify a model's content, therefore do not pay for the graph.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transom.graph.builder import DecoderBuilder, GraphBuilder, spec_of
    from transom.graph.graph import Graph
    from transom.graph.weights import Blocked, BlockedArrays, Dense, Weight

_HOME = {
    "Blocked": "transom.graph.weights",
    "BlockedArrays": "transom.graph.weights",
    "DecoderBuilder": "transom.graph.builder",
    "Dense": "transom.graph.weights",
    "Graph": "transom.graph.graph",
    "GraphBuilder": "transom.graph.builder",
    "Weight": "transom.graph.weights",
    "spec_of": "transom.graph.builder",
}

__all__ = ["Blocked", "BlockedArrays", "DecoderBuilder", "Dense", "Graph", "GraphBuilder", "Weight", "spec_of"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'transom.graph' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
