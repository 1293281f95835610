"""A sequence of tokens that comes in parts, and what the NumPy reference makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from transom.contract import Limits, Work
from transom.graph import Graph
from transom.reference.executor import Executor
from transom.sessions import PackedSession

Array = np.ndarray[Any, np.dtype[Any]]


def parted(rng: np.random.Generator, vocabulary: int, lengths: Sequence[int]) -> list[list[int]]:
    """Random token ids, one list for each length."""
    return [rng.integers(0, vocabulary, n).tolist() for n in lengths]


def reference(graph: Graph, parts: Sequence[Sequence[int]]) -> Array:
    """The reference's logits of one sequence, one step for each part: float32 [tokens, vocabulary]."""
    assert graph.decoder is not None
    packed = PackedSession(Executor(graph, keep_weights=True).run, graph.decoder, Limits(1, 4096, 4096, 0))
    state = packed.new_state()
    return np.concatenate([np.asarray(packed.step([Work(state, part, "all")])[0]) for part in parts])
