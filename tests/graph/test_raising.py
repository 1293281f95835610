"""Raising gives a small neutral graph, deterministically, and does not change the original graph.

Draws: float32 sums in another order differ by about 1e-6 of their size; the tolerances are ten times that or more.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from checkpoints import reference_session
from onnx_models import CONTEXT, group_query_decoder

from transom.contract import Work
from transom.graph import Graph
from transom.graph.importing import import_model
from transom.graph.passes import decompose
from transom.graph.raising import CannotRaise, DecoderHints, looks_like_decoder, raise_decoder

INPUTS = ["input_ids", "positions", "sequences", "past_positions", "past_sequences", "logit_rows"]


def imported(rng: np.random.Generator, **form: Any) -> Graph:
    model = ir.from_proto(group_query_decoder(rng, **form))
    assert isinstance(model, ir.Model)
    return import_model(model, name="decoder", weights_hash="w")


def logits(graph: Graph, ids: list[int]) -> Any:
    session = reference_session(graph)
    return session.step([Work(session.new_state(), ids, "all")])[0]


def test_inputs_and_outputs_are_those_of_every_decoder(rng: np.random.Generator) -> None:
    raised = raise_decoder(imported(rng), DecoderHints("test", CONTEXT))
    caches = [f"past_{part}.{i}" for i in range(2) for part in ("key", "value")]
    assert raised.input_names == INPUTS + caches
    assert raised.output_names == ["logits", *(c.replace("past", "present") for c in caches)]
    assert raised.decoder is not None
    assert (raised.decoder.family, raised.decoder.context, raised.decoder.hidden) == ("test", CONTEXT, 32)
    assert raised.decoder.weight_bytes > 0


def test_the_graph_it_came_from_is_left_as_it_was(rng: np.random.Generator) -> None:
    graph = imported(rng)
    before = graph.digest()
    raise_decoder(graph)
    assert graph.digest() == before
    assert looks_like_decoder(graph)


def test_the_same_file_gives_the_same_graph(rng: np.random.Generator) -> None:
    seed = int(rng.integers(1 << 30))
    first, second = (raise_decoder(imported(np.random.default_rng(seed))) for _ in range(2))
    assert first.digest() == second.digest()


def test_only_the_rows_asked_for_meet_the_vocabulary_matrix(rng: np.random.Generator) -> None:
    raised = raise_decoder(imported(rng))
    names = [n.name for n in raised.nodes()]
    gather = names.index("logit_rows.hidden")
    after = [n.op_type for n in list(raised.nodes())[gather + 1 :]]
    assert "MatMul" in after
    assert "CachedAttention" not in after


def test_every_value_has_a_type_and_a_shape(rng: np.random.Generator) -> None:
    raised = raise_decoder(imported(rng, packed=True))
    assert all(v.dtype is not None and v.shape is not None for n in raised.nodes() for v in n.outputs if v.uses())


def test_a_raised_graph_survives_saving_and_decomposing(tmp_path: Path, rng: np.random.Generator) -> None:
    raised = raise_decoder(imported(rng, sinks=True, local_window_size=3))
    ids = [int(i) for i in rng.integers(0, 288, 9)]
    wanted = logits(raised, ids)
    raised.save(tmp_path / "graph.onnx")
    reopened = Graph.open(tmp_path / "graph.onnx")
    reopened.check()
    assert np.array_equal(logits(reopened, ids), wanted)
    plain = decompose(reopened, [str(n.name) for n in reopened.nodes() if n.domain])
    plain.check()
    assert np.abs(logits(plain, ids) - wanted).max() < 1e-4


def test_a_graph_without_a_cache_is_no_decoder(rng: np.random.Generator) -> None:
    graph = imported(rng)
    model = graph.model
    for value in list(model.graph.outputs)[1:]:
        model.graph.outputs.remove(value)
    with pytest.raises(CannotRaise, match=r"no cache|unknown"):
        raise_decoder(graph)
