"""Which products an engine is told are the vocabulary matrix, by whose numbers logits stand or fall.

Draws: what is compared must be equal, whatever the numbers are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from transom.graph.reading import vocabulary_products
from transom.graph.weights import Weight
from transom.programs.reading import GraphReader
from transom.sparsity import Sparsity
from transom.testing.models import tiny_decoder


class Anything:
    tile, largest_head, largest_group = 1, 1 << 30, 1 << 30
    interleaved = float8 = True

    def matrix(self, weight: Weight) -> str:
        return ""

    def by(self, weight: Weight, *, head: bool) -> str:
        return "head" if head else "other"

    def policy(self, policy: Sparsity) -> str:
        return ""


@pytest.mark.parametrize("form", [{}, {"final_softcap": 5.0}, {"vocabulary": 64}], ids=str)
def test_the_vocabulary_matrix_is_what_logits_are_made_by(form: dict[str, Any], rng: np.random.Generator) -> None:
    """And not every matrix with as many rows: the model is 64 wide."""
    graph = tiny_decoder(rng, **form)
    assert vocabulary_products(graph) == {"head"}
    linear = [d for d in GraphReader(graph, Anything()).ops if d.kind == "linear"]
    assert {d.node for d in linear if d.by == "head"} == {"head"}
    if "vocabulary" in form:
        assert sum(d.dst.width == 64 for d in linear) > 1
