"""The neutral graph: building, checking, reading and rewriting it."""

from __future__ import annotations

from transom.graph.builder import DecoderBuilder, GraphBuilder, spec_of
from transom.graph.graph import Graph
from transom.graph.weights import Blocked, BlockedArrays, Dense, Weight

__all__ = ["Blocked", "BlockedArrays", "DecoderBuilder", "Dense", "Graph", "GraphBuilder", "Weight", "spec_of"]
