"""Sparse attention in standard operators, against its reference, in ONNX Runtime and in NumPy.

Draws: calls are drawn again until no choice is nearer to another one than float32 can see (`clear_call`).
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from sparse_calls import BATCHES, CAREFUL, FORMS, POLICIES, SPREAD, call, full

from transom.graph.passes import decompose
from transom.ops import Array, Sample
from transom.ops.cached_attention import SCHEMA
from transom.ops.sparse_routing import choose
from transom.ops.sparse_samples import MARGIN
from transom.reference.executor import Executor
from transom.testing.checks.operators import expected
from transom.testing.one_node import NODE, one_node


def clear_call(rng: np.random.Generator, batch: str, policy: str, form: str) -> Sample:
    """A call whose choice is unambiguous in float32."""
    while True:
        sample = call(rng, *BATCHES[batch], POLICIES[policy], **FORMS[form])
        if min(c.route.margin for c in choose(sample.inputs, full(sample))) > CAREFUL:
            return sample


def check(got: list[Array], sample: Sample) -> None:
    for result, wanted in zip(got, expected(SCHEMA, sample), strict=True):
        np.testing.assert_allclose(result, wanted, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.sweep(but=("balanced", "mean with columns", "textbook"))
def test_body_agrees_with_the_reference_in_onnx_runtime(policy: str, rng: np.random.Generator, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    for form, batch in [(f, b) for p, f, b in SPREAD if p == policy]:
        sample = clear_call(rng, batch, policy, form)
        graph, inputs = one_node(SCHEMA, sample)
        graph.save(tmp_path / "graph.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "graph.onnx", options, providers=["CPUExecutionProvider"])
        check(session.run(None, inputs), sample)


@pytest.mark.parametrize("policy", POLICIES)
def test_body_is_valid_onnx_and_agrees_in_numpy(policy: str, rng: np.random.Generator) -> None:
    for batch, form in (("ragged", "sinks"), ("decodes", "window across units")):
        sample = clear_call(rng, batch, policy, form)
        graph, inputs = one_node(SCHEMA, sample)
        flat = decompose(graph, [NODE])
        assert {n.domain for n in flat.nodes()} == {""}
        flat.check()
        outputs = Executor(flat).run(inputs)
        check([outputs[f"y{i}"] for i in range(3)], sample)


def test_a_graph_with_an_empty_cache_and_one_token_runs(rng: np.random.Generator) -> None:
    sample = call(rng, (1,), (0,), POLICIES["balanced"])
    graph, inputs = one_node(SCHEMA, sample)
    outputs = Executor(decompose(graph, [NODE])).run(inputs)
    check([outputs[f"y{i}"] for i in range(3)], sample)


def test_layers_share_a_body_where_their_policy_is_one(rng: np.random.Generator) -> None:
    def identifier(policy: str, **attributes: int) -> object:
        sample = call(rng, (2,), (3,), POLICIES[policy], **attributes)
        return next(iter(one_node(SCHEMA, sample)[0].model.functions))

    assert identifier("balanced", layer=1) == identifier("balanced", layer=2)
    assert len({identifier(policy) for policy in POLICIES}) == len(POLICIES)


def test_samples_for_the_kit_read_less_than_all_and_are_clear(rng: np.random.Generator) -> None:
    assert SCHEMA.samples is not None
    found = [s for s in SCHEMA.samples(rng) if s.label.startswith("sparse")]
    assert {"top_k" in s.label for s in found} == {True, False}
    for sample in found:
        routes = [c.route for c in choose(sample.inputs, full(sample))]
        assert min(r.margin for r in routes) >= MARGIN
        assert min(b.density for r in routes for b in r.blocks) < 0.6
