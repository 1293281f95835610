"""Why a graph is not taken, node by node.

Draws: the numbers are only carried along; what is checked does not depend on them.
"""

from __future__ import annotations

import numpy as np

from transom.authoring.refusing import NoAttention, refusals
from transom.errors import UnsupportedError
from transom.graph.sparse import is_attention
from transom.programs.reading import UnsupportedNode
from transom.testing.models import tiny_decoder


def test_every_reason_has_its_node(rng: np.random.Generator) -> None:
    graph = tiny_decoder(rng)
    nodes = list(graph.nodes())
    wrong = nodes[int(rng.integers(1, len(nodes)))]

    def no_form() -> None:
        raise UnsupportedNode(wrong, "no kernel")

    def unsupported() -> None:
        raise UnsupportedError("two values are carried on", "Use another backend")

    def no_attention() -> None:
        raise NoAttention("no tile")

    assert refusals(graph, no_attention) == {str(n.name): "no tile" for n in nodes if is_attention(n)}
    assert refusals(graph, lambda: None) == {}
    assert refusals(graph, no_form) == {str(wrong.name): "no kernel"}
    assert refusals(graph, unsupported) == {str(nodes[0].name): "two values are carried on"}
    plain = tiny_decoder(rng)
    plain.model.metadata_props.clear()
    assert plain.decoder is None
    reasons = refusals(plain, no_form)
    assert list(reasons) == [str(node.name) for node in nodes]
    assert set(reasons.values()) == {"runs decoders only, and this graph has no cache"}
