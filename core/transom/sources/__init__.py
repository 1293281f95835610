"""Sources: they turn anything that holds a model into graph, weights and tokenizer. `resolve` finds the right one."""

from __future__ import annotations

from transom.sources.base import Source, SourceModel, local_path
from transom.sources.resolve import bundle_at, located, resolve, sources

__all__ = ["Source", "SourceModel", "bundle_at", "local_path", "located", "resolve", "sources"]
