"""Policies in a graph: which nodes get one, the notes on the others, and that attention reads accordingly.

Draws: a model is drawn again until no sparse choice is closer to another one than `CLOSE`; then all rows agree.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from redraws import without_close_choices

from transom.errors import OptionError
from transom.graph import Graph, GraphBuilder
from transom.graph.passes import decompose
from transom.graph.sparse import is_attention, with_sparsity
from transom.ops import Array
from transom.reference.executor import Executor
from transom.sparsity import PRESETS, LayerSparsity, Sparsity
from transom.testing.bench import ReferenceOracle
from transom.testing.models import tiny_decoder

POLICY = Sparsity(0.3, columns=4, dense_below=0, heads=((1.0, 0.0), (2.0, 1.0)))
CLOSE = 1e-4
"""Smallest margin of a choice, relative to the scores: a score is a sum of a few hundred float32 products, each off by
6e-8, and the layers before it add a few times as much."""


def policies(graph: Graph) -> list[str]:
    return [n.attributes.get_string("sparsity", "") for n in graph.nodes() if is_attention(n)]


def test_each_layer_gets_its_own_part_of_the_policy(rng: np.random.Generator) -> None:
    graph = with_sparsity(tiny_decoder(rng), POLICY)
    assert policies(graph) == [POLICY.layer(0).to_string(), POLICY.layer(1).to_string()]
    assert [LayerSparsity.from_string(text).heads for text in policies(graph)] == [(1.0, 0.0), (2.0, 1.0)]
    assert graph.notes == ()


def test_the_original_graph_is_unchanged(rng: np.random.Generator) -> None:
    dense = tiny_decoder(rng)
    before = dense.digest()
    sparse = with_sparsity(dense, POLICY)
    assert dense.digest() == before != sparse.digest()
    assert policies(dense) == ["dense", "dense"]
    assert with_sparsity(dense, PRESETS["off"]) is dense


def test_a_sparse_graph_is_valid_and_a_saved_one_has_the_same_digest(rng: np.random.Generator, tmp_path: Path) -> None:
    graph = with_sparsity(tiny_decoder(rng), POLICY)
    graph.check()
    graph.save(tmp_path / "graph.onnx")
    again = Graph.open(tmp_path / "graph.onnx")
    assert again.digest() == graph.digest()
    assert policies(again) == policies(graph)
    assert len(again.model.functions) == 2  # one body per layer view, none for the dense form


def test_a_sparse_graph_reads_less_than_a_dense_one_and_its_decomposed_form_agrees(rng: np.random.Generator) -> None:
    def draw() -> tuple[Graph, Graph, list[int], Array]:
        dense = tiny_decoder(rng, context=400)
        sparse = with_sparsity(dense, POLICY)
        tokens = [int(t) for t in rng.integers(0, 61, 320)]
        return dense, sparse, tokens, ReferenceOracle(sparse).logits(tokens)

    dense, sparse, tokens, wanted = without_close_choices(draw, CLOSE)
    assert np.abs(wanted - ReferenceOracle(dense).logits(tokens)).max() > 1e-3
    flat = decompose(sparse, [str(n.name) for n in sparse.nodes() if is_attention(n)])
    assert not any(is_attention(n) for n in flat.nodes())
    np.testing.assert_allclose(ReferenceOracle(flat).logits(tokens), wanted, rtol=1e-3, atol=1e-3)


def test_attention_with_a_bias_stays_dense_and_is_noted(rng: np.random.Generator) -> None:
    graph = with_sparsity(tiny_decoder(rng, attention_bias=True), POLICY)
    assert policies(graph) == ["dense", "dense"]
    assert graph.notes == ("2 attention nodes stay dense: a bias on its scores",)


def test_a_table_for_another_model_is_refused(rng: np.random.Generator) -> None:
    with pytest.raises(OptionError, match="heads for 2 layers, and the model has 3"):
        with_sparsity(tiny_decoder(rng, layers=3), POLICY)


def test_a_graph_without_attention_is_refused() -> None:
    b = GraphBuilder("plain")
    b.output(b.op("Neg", b.input("x", "float32", ["n"])), "y")
    with pytest.raises(OptionError, match="no attention over a cache"):
        with_sparsity(b.finish(weights_hash=""), POLICY)


def test_a_layer_whose_calibration_makes_every_head_dense_gets_no_policy(rng: np.random.Generator) -> None:
    graph = with_sparsity(tiny_decoder(rng), PRESETS["safe"].with_heads(((0.0, 0.0), (1.0, 1.0))))
    assert policies(graph)[0] == "dense"
    assert policies(graph)[1] == PRESETS["safe"].to_string()
    Executor(graph)
