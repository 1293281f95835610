"""Opens the model of a benchmark, with its tokenizer."""

from __future__ import annotations

from pathlib import Path

from models import sample_model

from transom.graph import Graph
from transom.sources import resolve
from transom.text import Tokenizer


def opened(model: str | None) -> tuple[str, Graph, Tokenizer]:
    """(file's name, graph, tokenizer) of a GGUF file or a folder; None for the sample model."""
    path = model or sample_model()
    source = resolve(path).open(path)
    if source.tokenizer is None:
        raise SystemExit("The model has no tokenizer, and this needs text")
    return Path(path).name, source.graph, source.tokenizer
