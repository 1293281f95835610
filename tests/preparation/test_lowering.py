"""Lower, decompose or refuse, and `explain`, on a small graph with an operator of the domain `transom`.

Draws: float32 sums in another order differ by about 1e-6 of their size; the tolerances are ten times that or more.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from made_up import CPU, NPU, MadeUp

import transom
from transom.contract import Claim
from transom.errors import EngineError, UnsupportedError
from transom.loading.explanation import explain_graph
from transom.loading.machine import Machine
from transom.preparation.lowering import claims_of, lower, refusal_lines, try_lower
from transom.testing.models import tiny_decoder


@pytest.fixture
def graph(rng: np.random.Generator) -> Any:
    return tiny_decoder(rng)


def count(graph: Any, operator: str) -> int:
    return sum(n.op_type == operator for n in graph.nodes())


def test_a_graph_that_is_claimed_whole_stays_as_it_is(graph: Any) -> None:
    lowered = lower(graph, MadeUp(), CPU, {})
    assert lowered.graph is graph
    assert lowered.exact
    assert (lowered.decomposed, lowered.notes()) == ({}, [])
    assert [c.node for c in lowered.claims] == [n.name for n in graph.nodes()]
    assert not lower(graph, MadeUp(does="inexact"), CPU, {}).exact


def test_a_refused_node_with_a_body_is_replaced_by_it_and_computes_the_same(
    graph: Any, rng: np.random.Generator
) -> None:
    from transom.preparation.reference_outputs import reference_logits

    layers = count(graph, "CachedAttention")
    lowered = lower(graph, MadeUp(does="refuse:CachedAttention"), CPU, {})
    assert count(lowered.graph, "CachedAttention") == 0
    assert len(lowered.decomposed) == layers
    assert lowered.notes() == [
        f"{layers} nodes run in simpler operators: there is no CachedAttention in this engine"
    ]  # fmt: skip
    ids = [int(i) for i in rng.integers(0, 61, 7)]
    np.testing.assert_allclose(reference_logits(lowered.graph, ids), reference_logits(graph, ids), atol=1e-5)


def test_bodies_are_decomposed_again_where_they_are_refused_too(graph: Any) -> None:
    lowered = lower(graph, MadeUp(does="refuse:CachedAttention+Softmax"), CPU, {})
    assert count(lowered.graph, "CachedAttention") == count(lowered.graph, "Softmax") == 0
    assert any("Softmax" in reason for reason in lowered.decomposed.values())


def test_a_refused_node_without_a_body_is_named_with_operator_and_reason(graph: Any) -> None:
    with pytest.raises(UnsupportedError) as caught:
        lower(graph, MadeUp(does="refuse:MatMul+Gather"), CPU, {})
    matrices, rows = count(graph, "MatMul"), count(graph, "Gather")
    assert f"{matrices + rows} nodes" in caught.value.cause
    assert "transom explain" in caught.value.fix
    first = next(n.name for n in graph.nodes() if n.op_type == "MatMul")
    assert caught.value.details[0] == f"{matrices} × MatMul: there is no MatMul in this engine (first: {first})"
    assert any(line.startswith(f"{rows} × Gather") for line in caught.value.details)


def test_a_body_that_is_refused_too_is_named_by_its_node(graph: Any) -> None:
    with pytest.raises(UnsupportedError) as caught:
        lower(graph, MadeUp(does="refuse:CachedAttention+Concat"), CPU, {})
    assert any("Concat" in line and "attention" in line.lower() for line in caught.value.details)


def test_silence_and_double_answers_are_breaches(graph: Any) -> None:
    backend = MadeUp()
    whole = [Claim(str(n.name), True) for n in graph.nodes()]

    def claiming(answers: list[Any]) -> Any:
        backend.claim = lambda *_: answers  # type: ignore[method-assign]
        return backend

    assert len(claims_of(graph, claiming(whole[::-1]), CPU, {})) == len(whole)
    for answers, said in (
        (whole[1:], f"silent on the node {whole[0].node}"),
        ([*whole, whole[0]], "twice"),
        ([*whole, Claim("stranger", True)], "not there"),
        ([*whole[1:], Claim(whole[0].node, False)], "without a reason"),
        ([None, *whole], "NoneType"),
    ):
        with pytest.raises(EngineError, match=said):
            claims_of(graph, claiming(answers), CPU, {})


class Fusing(MadeUp):
    """Runs some nodes only as one: `groups` says which, by name."""

    groups: dict[str, str]

    def claim(self, graph: Any, device: Any, options: Any) -> list[Claim]:
        return [replace(c, group=self.groups.get(c.node, "")) for c in super().claim(graph, device, options)]


def fusing(refused: str, *nodes: str) -> Fusing:
    backend = Fusing("fusing", f"refuse:{refused}")
    backend.groups = dict.fromkeys(nodes, "fused") | {"layers.1.q.rotated": "other", "layers.1.k.rotated": "other"}
    return backend


def test_a_group_that_is_claimed_whole_stays_as_it_is(graph: Any) -> None:
    lowered = lower(graph, fusing("Nothing", "layers.0.activated", "layers.0.gated"), CPU, {})
    assert lowered.graph is graph
    assert {c.node for c in lowered.claims if c.group == "fused"} == {"layers.0.activated", "layers.0.gated"}


def test_a_group_with_a_refused_node_is_refused_whole_and_no_other_is(graph: Any) -> None:
    backend = fusing("CachedAttention", "layers.0.q.rotated", "layers.0.attention", "layers.0.o")
    claims = {c.node: c.reason for c in claims_of(graph, backend, CPU, {}) if not c.ok}
    why = "there is no CachedAttention in this engine"
    fused = f"runs only fused with a node that is refused: {why}"
    assert claims == {
        "layers.0.attention": why,
        "layers.1.attention": why,
        "layers.0.q.rotated": fused,
        "layers.0.o": fused,
    }


def test_a_broken_group_is_decomposed_and_what_has_no_body_is_asked_about_again(
    graph: Any, rng: np.random.Generator
) -> None:
    from transom.preparation.reference_outputs import reference_logits

    backend = fusing("CachedAttention", "layers.0.q.rotated", "layers.0.attention", "layers.0.o")
    lowered = lower(graph, backend, CPU, {})
    assert set(lowered.decomposed) >= {"layers.0.q.rotated", "layers.0.attention", "layers.1.attention"}
    names = {str(n.name) for n in lowered.graph.nodes()}
    assert {"layers.0.o", "layers.0.k.rotated", "layers.1.q.rotated", "layers.1.k.rotated"} <= names
    ids = [int(i) for i in rng.integers(0, 61, 7)]
    np.testing.assert_allclose(reference_logits(lowered.graph, ids), reference_logits(graph, ids), atol=1e-5)


def test_a_group_that_stays_broken_is_an_error_that_names_all_of_it(graph: Any) -> None:
    backend = fusing("Gather", "embedding", "embedding.scaled")
    with pytest.raises(UnsupportedError) as caught:
        lower(graph, backend, CPU, {})
    gathers = count(graph, "Gather")
    assert f"{gathers + 1} nodes" in caught.value.cause
    assert set(caught.value.details) == {
        f"{gathers} × Gather: there is no Gather in this engine (first: embedding)",
        "1 × Mul: runs only fused with a node that is refused: there is no Gather in this engine "
        "(first: embedding.scaled)",
    }


def test_refusals_are_grouped_by_operator_and_reason() -> None:
    lines = refusal_lines([("A", "a1", "x"), ("B", "b1", "y"), ("B", "b2", "y"), ("B", "b3", "z")])
    assert lines == ["2 × B: y (first: b1)", "1 × A: x (first: a1)", "1 × B: z (first: b3)"]


def test_attempt_goes_as_far_as_it_can(graph: Any) -> None:
    tried = try_lower(graph, MadeUp(does="refuse:CachedAttention+MatMul"), CPU, {})
    assert count(tried.graph, "CachedAttention") == 0
    assert set(tried.refused.values()) == {"there is no MatMul in this engine"}


# through `load` -------------------------------------------------------------------------------------------------------


def test_a_load_decomposes_and_says_so(here: Any) -> None:
    here.use(MadeUp("plain", "refuse:CachedAttention"))
    with here.load() as model:
        assert model.report.backend == "plain"
        assert model.report.check.startswith("passed")
        assert any("2 nodes run in simpler operators" in note for note in model.report.notes)
        assert model.generate("Hello", max_new_tokens=3).usage.completion_tokens


def test_a_load_refuses_before_compiling(here: Any) -> None:
    picky = MadeUp("picky", "refuse:MatMul")
    here.use(picky)
    with pytest.raises(UnsupportedError) as caught:
        here.load(backend="picky")
    assert picky.calls == []
    assert "× MatMul: there is no MatMul in this engine (first: " in caught.value.details[0]
    with here.load() as model:
        assert model.report.backend == "reference"


# explain --------------------------------------------------------------------------------------------------------------


def machine(here: Any) -> Machine:
    from transom.loading.machine import survey

    return survey()


def test_explain_counts_what_runs_what_is_decomposed_and_what_is_refused(here: Any, graph: Any) -> None:
    here.use(
        MadeUp("all"),
        MadeUp("some", "refuse:CachedAttention"),
        MadeUp("none", "refuse:MatMul+CachedAttention"),
        MadeUp("broken", "claim:raise"),
        MadeUp("npu_only", kind="npu"),
        devices=[CPU, NPU],
    )
    found = explain_graph(graph, "tiny", machine(here))
    answers = {(a.backend, a.device): a for a in found.answers}
    assert len(answers) == 12
    nodes = len(list(graph.nodes()))
    assert found.nodes == nodes
    layers = count(graph, "CachedAttention")

    whole = answers["all", "cpu"]
    assert whole.runs
    assert sum(row[0] for row in whole.counts()) == nodes
    assert {row[2] for row in whole.counts()} == {"runs"}

    some = answers["some", "cpu"]
    assert some.runs
    assert some.counts()[0] == (layers, "transom::CachedAttention", "decomposed", "there is no CachedAttention in this engine")  # fmt: skip  # noqa: E501

    none = answers["none", "cpu"]
    assert not none.runs
    refused = [row for row in none.counts() if row[2] == "refused"]
    assert refused == none.counts()[: len(refused)]
    assert (count(graph, "MatMul"), "MatMul", "refused", "there is no MatMul in this engine") in refused
    [attention] = [row for row in refused if row[1] == "transom::CachedAttention"]
    assert "and inside its body: there is no MatMul" in attention[3]

    broken = answers["broken", "cpu"]
    assert not broken.runs
    assert "KeyError" in broken.error
    assert not answers["all", "npu:0"].runs
    assert answers["npu_only", "npu:0"].runs

    text = str(found)
    assert "all on cpu: yes, native, made up" in text
    assert "broken on cpu: no" in text
    assert "all on npu:0: no, not for it" in text
    back = json.loads(json.dumps(found.to_dict()))
    assert back["nodes"] == nodes
    assert {a["backend"] for a in back["answers"]} == {"all", "some", "none", "broken", "npu_only", "reference"}


def test_explain_asks_about_one_device_where_one_is_named(here: Any, graph: Any) -> None:
    here.use(MadeUp("all"), devices=[CPU, NPU])
    assert {a.device for a in explain_graph(graph, "tiny", machine(here), device="npu:0").answers} == {"npu:0"}


def test_explain_tells_what_becomes_of_a_broken_group_in_the_end(here: Any, graph: Any) -> None:
    here.use(fusing("CachedAttention", "layers.0.q.rotated", "layers.0.attention", "layers.0.o"))
    [answer] = [a for a in explain_graph(graph, "tiny", machine(here)).answers if a.backend == "fusing"]
    outcomes = {n.node: n.outcome for n in answer.nodes if n.outcome != "runs"}
    assert answer.runs
    assert outcomes == dict.fromkeys(
        ["layers.0.q.rotated", "layers.0.attention", "layers.1.attention"], "decomposed"
    )  # fmt: skip


def test_explain_agrees_with_what_a_load_does(here: Any) -> None:
    here.use(MadeUp("some", "refuse:CachedAttention"), MadeUp("none", "refuse:MatMul"))
    runs = {a.backend: a.runs for a in transom.explain(here.model).answers}
    assert runs == {"some": True, "none": False, "reference": True}
    here.load(backend="some").close()
    with pytest.raises(UnsupportedError):
        here.load(backend="none")
