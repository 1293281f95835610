"""Decoders with the sizes of real models and random weights, each created only when it is read.

All matrices are slices of one table of normally distributed numbers, at different offsets. Reading one costs little
more than copying it, and a model of eight billion parameters takes a few megabytes until it is written.
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
    "3B": {
        "layers": 28, "q_heads": 24, "kv_heads": 8, "head_dim": 128, "hidden": 3072, "inner": 8192,
        "vocabulary": 128256,
    },
    "6B-grouped": {
        "layers": 32, "q_heads": 32, "kv_heads": 4, "head_dim": 128, "hidden": 4096, "inner": 11008,
        "vocabulary": 64000,
    },
    "7B": {
        "layers": 32, "q_heads": 32, "kv_heads": 32, "head_dim": 128, "hidden": 4096, "inner": 11008,
        "vocabulary": 32000,
    },
    "7B-grouped": {
        "layers": 32, "q_heads": 32, "kv_heads": 8, "head_dim": 128, "hidden": 4096, "inner": 14336,
        "vocabulary": 32000,
    },
    "7B-wide": {
        "layers": 28, "q_heads": 28, "kv_heads": 4, "head_dim": 128, "hidden": 3584, "inner": 18944,
        "vocabulary": 152064,
    },
}  # fmt: skip
"""Sizes of Llama 3.2 1B and 3B, Llama 3.1 8B and Llama 2 7B (Meta's model cards), of Yi-6B (01.AI's), Mistral 7B v0.1
(Mistral AI's) and Qwen2.5 7B (the Qwen team's), and one for trials. The head is tied, as in 1B and 3B."""
TABLE = 1 << 22
STRIDE = 7919
"""Distance between the starts of successive matrices in the table."""


@cache
def table() -> Any:
    """The numbers that all matrices are slices of."""
    return np.random.default_rng(0).standard_normal(TABLE).astype(np.float32)


def scaled(stored: str, columns: int) -> Any:
    """The table for a matrix of `columns`, scaled in float32, since processors multiply 16-bit numbers slowly."""
    kept: Any = ml_dtypes.bfloat16 if stored == "bfloat16" else np.dtype(stored)
    return (table() * np.float32(columns**-0.5)).astype(kept)


class DrawnWeights:
    """Replaces the weights of `transom.testing.models`."""

    def __init__(self, rng: np.random.Generator, stored: Any, block: int) -> None:
        self._stored, self._made = stored, 0

    def hash(self) -> str:
        return hashlib.blake2b(f"{self._stored}:{self._made}".encode(), digest_size=16).hexdigest()

    def vector(self, size: int, centre: float = 0.0, spread: float = 0.2) -> Dense:
        return Dense((size,), "float32", lambda: np.full(size, centre, np.float32))

    def matrix(self, rows: int, columns: int) -> Dense:
        self._made += 1
        place = self._made * STRIDE

        def load() -> Any:
            return np.resize(np.roll(scaled(self._stored, columns), place), (rows, columns))

        return Dense((rows, columns), self._stored, load)


def made_of(weights: Any, context: int, stored: str, **sizes: Any) -> Graph:
    """A decoder of any sizes, its weights made by a class like `DrawnWeights`."""
    with mock.patch.object(models, "_Weights", weights):
        return models.tiny_decoder(np.random.default_rng(0), context=context, weights=stored, **sizes)  # type: ignore[arg-type]


def decoder(shape: str, context: int, stored: str = "bfloat16", layers: int | None = None) -> Graph:
    """A decoder of one of `SHAPES`, its matrices in `stored`: `"bfloat16"`, `"float16"` or `"float32"`.

    Args:
        layers: number of layers; None: that of the shape.
    """
    sizes = SHAPES[shape] if layers is None else {**SHAPES[shape], "layers": layers}
    return made_of(DrawnWeights, context, stored, **sizes)
