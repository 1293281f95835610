"""Decoders of the sizes of real ones with random weights that take no memory: each matrix is drawn when it is read.

All matrices are cut out of one table of normally distributed numbers, at places of their own, so that reading one costs
little more than copying it, and a model of eight billion parameters is a few megabytes until it is written somewhere.
"""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np

from transom.graph import Dense, Graph
from transom.testing import models

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "layers": 2, "q_heads": 8, "kv_heads": 2, "head_dim": 64, "hidden": 512, "inner": 1024, "vocabulary": 1024,
    },
    "1B": {
        "layers": 16, "q_heads": 32, "kv_heads": 8, "head_dim": 64, "hidden": 2048, "inner": 8192, "vocabulary": 128256,
    },
    "8B": {
        "layers": 32, "q_heads": 32, "kv_heads": 8, "head_dim": 128, "hidden": 4096, "inner": 14336,
        "vocabulary": 128256,
    },
}  # fmt: skip
"""Of Llama 3.2 1B and Llama 3.1 8B (Meta's model cards), and one to try things with. The head is tied, as in 1B."""
TABLE = 1 << 22


@cache
def _table(stored: str) -> Any:
    kept: Any = ml_dtypes.bfloat16 if stored == "bfloat16" else np.dtype(stored)
    return np.random.default_rng(0).standard_normal(TABLE).astype(np.float32).astype(kept)


class Drawn:
    """Stands for the weights of `transom.testing.models`."""

    def __init__(self, rng: np.random.Generator, stored: Any, block: int) -> None:
        self._stored, self._made = stored, 0

    def hash(self) -> str:
        return hashlib.blake2b(f"{self._stored}:{self._made}".encode(), digest_size=16).hexdigest()

    def vector(self, size: int, centre: float = 0.0, spread: float = 0.2) -> Dense:
        return Dense((size,), "float32", lambda: np.full(size, centre, np.float32))

    def matrix(self, rows: int, columns: int) -> Dense:
        self._made += 1
        place = self._made * 7919

        def load() -> Any:
            table = np.roll(_table(self._stored), place)
            return np.resize(table, (rows, columns)) * table.dtype.type(columns**-0.5)

        return Dense((rows, columns), self._stored, load)


def decoder(shape: str, context: int, stored: str = "bfloat16") -> Graph:
    """A decoder of one of `SHAPES`, its matrices in `stored`: `"bfloat16"`, `"float16"` or `"float32"`."""
    with mock.patch.object(models, "_Weights", Drawn):
        return models.tiny_decoder(np.random.default_rng(0), context=context, weights=stored, **SHAPES[shape])  # type: ignore[arg-type]


def plain(graph: Graph) -> Graph:
    """A decoder whose quantised matrices are plain float16 ones, read as they would be computed: to round anew."""
    from transom.graph.editing import Editor
    from transom.graph.reading import linear_weight
    from transom.graph.weights import Blocked, Weight, dequantize

    model = graph.model.clone()
    editor = Editor(model)
    made: dict[int, Any] = {}

    def loaded(weight: Weight) -> Any:
        return lambda: dequantize(weight).astype(np.float16)

    for node in list(model.graph):
        weight = linear_weight(node)
        if not isinstance(weight, Blocked):
            continue
        if id(weight) not in made:
            name = f"{node.name}.plain"
            matrix = editor.weight(Dense(weight.shape, "float16", loaded(weight)), name)
            made[id(weight)] = editor.op("Transpose", matrix, perm=[1, 0], name=f"{name}.transposed")
        node.replace_input_with(1, made[id(weight)])
    editor.finish_edit()
    return Graph(model, weights_hash=f"{graph.weights_hash}-plain", notes=graph.notes)
