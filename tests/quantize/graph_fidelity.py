"""How closely a quantized graph agrees with the exact one: both run in the NumPy reference on given texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from transom.preparation.agreement import Agreement, compare
from transom.preparation.reference_outputs import reference_logits

if TYPE_CHECKING:
    from transom.graph import Graph


def fidelity(
    exact: Graph,
    rounded: Graph,
    texts: Sequence[Sequence[int]],
    progress: Callable[[float], None] | None = None,
) -> Agreement:
    """Compare the logits of two decoders with one vocabulary over all positions of all texts.

    Args:
        texts: token ids of each, none empty; each is read from position 0.
        progress: called with the share that is done.

    Raises:
        SourceError: a graph computes what is no number.
    """
    steps = 2 * len(texts)
    sides: list[list[np.ndarray]] = [[], []]
    for i, ids in enumerate(texts):
        for side, graph in enumerate((exact, rounded)):
            done = 2 * i + side

            def part(share: float, done: int = done) -> None:
                if progress is not None:
                    progress((done + share) / steps)

            sides[side].append(reference_logits(graph, ids, part))
    return compare(np.concatenate(sides[0]), np.concatenate(sides[1]))
