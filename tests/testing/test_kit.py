"""The kit itself: outcomes are distinct, nothing is skipped silently, results are data, runs can be repeated.

Draws: what is changed is off by far more than the tolerances, and what is not by far less.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from broken_numbers import GarbageLogits
from changed_reference import Changed
from paged_backends import (
    ExportOnly,
    HalfPrecision,
    HugePool,
    LeaksPages,
    OneSequence,
    Paged,
    SaysItHasNoPages,
    StaticShapes,
    WritesBeforeItAsksForPages,
)

from transom.contract import Artifact, Claim, Device, Offer, Options, Progress, Refusal, Session, Verdict
from transom.errors import OptionError
from transom.graph import Graph
from transom.reference import ReferenceBackend
from transom.testing import ConformanceResult, run
from transom.testing.checks import all_checks
from transom.testing.compare import compare, compare_rows, normalized_error
from transom.testing.driver import compare_best
from transom.testing.result import Failed

CPU = Device("cpu", "cpu", "x86_64", 8 << 30)
SESSIONS = ["session.*", "step.*", "state.*", "failure.*", "limits.*", "walk.*", "logits.gqa", "logits.window"]


def refused(result: ConformanceResult) -> set[str]:
    return {c.name for c in result.refused}


# sessions of other kinds than the reference's -------------------------------------------------------------------------
def test_paged_session_passes(seed: int) -> None:
    result = run(Paged(), CPU, only=SESSIONS, seed=seed)
    assert result.ok, result.text()
    assert not result.refused, result.text()


def test_session_that_runs_one_sequence_passes_and_reports_refusals(seed: int) -> None:
    result = run(OneSequence(), CPU, only=SESSIONS, seed=seed)
    assert result.ok, result.text()
    assert refused(result) == {"step.ragged", "step.ragged_windows"}
    assert all("one sequence at a time" in c.reason for c in result.refused)


def test_session_of_static_shapes_passes(seed: int) -> None:
    result = run(StaticShapes(), CPU, only=SESSIONS, seed=seed)
    assert result.ok, result.text()
    assert refused(result) == {"step.ragged", "step.ragged_windows"}


@pytest.mark.parametrize("backend", [LeaksPages, WritesBeforeItAsksForPages, SaysItHasNoPages])
def test_wrong_pools_are_caught(backend: type[Paged], seed: int) -> None:
    result = run(backend(), CPU, only=backend.caught_by, seed=seed)
    assert [c.outcome for c in result.checks] == ["failed"], result.text()


def test_pool_too_large_to_fill_is_reported_and_not_passed(seed: int) -> None:
    result = run(HugePool(), CPU, only=["limits.out_of_pages"], seed=seed)
    assert refused(result) == {"limits.out_of_pages"}
    assert "give options that make it small" in result.refused[0].reason


def test_backend_that_only_exports_is_held_to_what_it_does(seed: int) -> None:
    phone = Device("remote", "remote:snapdragon-8-gen-2", "hexagon_v73", 0)
    result = run(ExportOnly(), phone, seed=seed)
    assert result.ok, result.text()
    passed = {c.name for c in result.passed}
    assert {"probe.answers", "claim.every_node", "compile.cancel", "artifact.verdicts"} <= passed
    assert not any(name.startswith(("logits.", "state.", "walk.", "operator.")) for name in passed)
    assert all(c.reason for c in result.refused)


def test_refused_device_refuses_all_that_needs_it(seed: int) -> None:
    result = run(
        Changed(), Device("cuda", "cuda:0", "sm_90", 80 << 30), only=["probe.*", "operator.*", "state.*"], seed=seed
    )
    assert {c.name for c in result.passed} == {"probe.cheap"}
    assert not result.failed
    assert all("refuses cuda:0: runs on the CPU only" in c.reason for c in result.refused)


def test_half_precision_passes_at_its_own_tolerance_and_fails_at_float32(seed: int) -> None:
    only = [
        "logits.gqa",
        "logits.everything",
        "operator.MatMul",
        "operator.Softmax",
        "operator.transom.CachedAttention",
    ]
    half = run(HalfPrecision(), CPU, only=only, precision="float16", seed=seed)
    assert half.ok, half.text()
    assert not half.refused
    full = run(HalfPrecision(), CPU, only=only, seed=seed)
    assert {c.name for c in full.failed} == set(only)


class Inexact(HalfPrecision):
    def claim(self, graph: Graph, device: Device, options: Options) -> Sequence[Claim]:
        return [Claim(c.node, c.ok, c.reason, exact=False) for c in super().claim(graph, device, options)]


def test_inexact_claims_are_measured_and_only_garbage_fails(seed: int) -> None:
    result = run(Inexact(), CPU, only=["logits.gqa", "operator.MatMul"], seed=seed)
    assert result.ok, result.text()
    assert all(c.error is not None and 1e-5 < c.error < 1e-2 for c in result.checks)


class BoundToItsContext(Changed):
    """Static shapes of a whole context: the artifact says so, and its check leaves that to the host."""

    def compile(self, part: Graph, device: Device, options: Options, progress: Progress) -> Artifact:
        artifact = super().compile(part, device, options, progress)
        self.made_for = options["context"]
        return replace(artifact, requires={**artifact.requires, "context": str(self.made_for), "threads": "None"})

    def check(self, artifact: Artifact, device: Device) -> Verdict:
        kept = {k: v for k, v in artifact.requires.items() if k not in ("context", "threads")}
        return super().check(replace(artifact, requires=kept), device)

    def load(self, artifact: Artifact, device: Device, options: Options, scratch: Path) -> Session:
        assert options["context"] == self.made_for
        return super().load(artifact, device, options, scratch)


def test_artifact_bound_to_options_of_load_passes_and_is_loaded_with_no_others(seed: int) -> None:
    only = ["artifact.requires", "artifact.verdicts", "load.context"]
    for options in ({}, {"context": 96}):
        result = run(BoundToItsContext(), CPU, only=only, options=options, seed=seed)
        assert result.ok, result.text()
        assert not result.refused


class TakesTheOptionsOfALoad(Changed):
    def claim(self, graph: Graph, device: Device, options: Options) -> Sequence[Claim]:
        assert {"precision", "context", "threads"} <= set(options)
        assert options.get("own", 1) == 1
        return super().claim(graph, device, options)


def test_backend_is_given_the_options_that_the_host_gives_and_those_that_are_named(seed: int) -> None:
    for options in ({}, {"own": 1}):
        assert run(TakesTheOptionsOfALoad(), CPU, only=["logits.gqa"], options=options, seed=seed).ok
    assert not run(TakesTheOptionsOfALoad(), CPU, only=["logits.gqa"], options={"own": 2}, seed=seed).ok


# refusing operators ---------------------------------------------------------------------------------------------------
class Refuses(Changed):
    operators = frozenset[str]()

    def claim(self, graph: Graph, device: Device, options: Options) -> Sequence[Claim]:
        return [
            Claim(c.node, False, f"no kernel for {n.op_type}") if n.op_type in self.operators else c
            for c, n in zip(super().claim(graph, device, options), graph.nodes(), strict=True)
        ]


class NoAttention(Refuses):
    operators = frozenset({"CachedAttention", "RMSNormalization"})


class NoMatMul(Refuses):
    operators = frozenset({"MatMul"})


class FixedSizes(Changed):
    def claim(self, graph: Graph, device: Device, options: Options) -> Sequence[Claim]:
        if any(not isinstance(d, int) for v in graph.model.graph.inputs for d in v.shape or ()):
            return [Claim(str(n.name), False, "fixed sizes only") for n in graph.nodes()]
        return super().claim(graph, device, options)


def test_operator_that_is_not_claimed_is_tried_as_its_body(seed: int) -> None:
    only = ["operator.transom.CachedAttention", "operator.RMSNormalization", "logits.everything"]
    result = run(NoAttention(), CPU, only=only, seed=seed)
    assert result.ok, result.text()
    assert not result.refused
    for check in result.checks[:2]:
        assert check.parts
        assert all(p.reason.startswith("by its body, since: no kernel for") for p in check.parts)


def test_refused_operator_is_recorded_with_its_reason_and_so_is_every_model_that_needs_it(seed: int) -> None:
    result = run(NoMatMul(), CPU, only=["operator.MatMul", "operator.Add", "logits.gqa", "state.fork"], seed=seed)
    assert refused(result) == {"operator.MatMul", "logits.gqa", "state.fork"}
    by_name = {c.name: c for c in result.refused}
    assert by_name["operator.MatMul"].parts[0].reason == "no kernel for MatMul"
    assert "MatMul: no kernel for MatMul" in by_name["logits.gqa"].reason
    assert result.ok, "a refusal is no failure"


def test_operator_that_takes_fixed_sizes_only_is_told_apart(seed: int) -> None:
    (check,) = run(FixedSizes(), CPU, only=["operator.Tanh"], seed=seed).checks
    assert check.outcome == "passed"
    assert all(p.reason == "with fixed sizes only, since: fixed sizes only" for p in check.parts)


class RaisesOnLoad(Changed):
    def load(self, *arguments: object) -> None:  # type: ignore[override]
        raise SystemError("the driver is gone")


def test_exception_of_the_backend_is_a_failure_with_its_words(seed: int) -> None:
    result = run(RaisesOnLoad(), CPU, only=["state.fork", "operator.Neg"], seed=seed)
    assert {c.name for c in result.failed} == {"state.fork", "operator.Neg"}
    assert all("SystemError: the driver is gone" in c.reason for c in result.failed)


# results --------------------------------------------------------------------------------------------------------------
def test_result_is_json_and_holds_every_check(seed: int) -> None:
    result = run(GarbageLogits(), CPU, only=["logits.*", "operator.Add", "state.bytes"], seed=seed)
    told = json.loads(result.to_json())
    assert told["ok"] is False
    assert told["seed"] == seed
    assert told["device"]["id"] == "cpu"
    assert sum(told["counts"].values()) == len(told["checks"]) == len(result.checks)
    assert {c["outcome"] for c in told["checks"]} == {"passed", "failed"}
    add = next(c for c in told["checks"] if c["name"] == "operator.Add")
    assert len(add["parts"]) == 4
    assert "FAILED  logits.gqa" in result.text()
    assert f"seed {seed}" in result.text()


def test_run_is_repeated_by_its_seed_whatever_else_runs(seed: int) -> None:
    errors = [
        {c.name: c.error for c in run(Changed(), CPU, only=only, seed=seed).checks}["logits.gqa"]
        for only in (["logits.gqa"], ["operator.Add", "logits.*"])
    ]
    assert errors[0] == errors[1]
    assert run(Changed(), CPU, only=["contract.form"]).seed != run(Changed(), CPU, only=["contract.form"]).seed


def test_checks_report_as_they_go(seed: int) -> None:
    told: list[tuple[str, int, int]] = []
    run(Changed(), CPU, only=["contract.form", "probe.answers"], report=lambda c, i, n: told.append((c.name, i, n)))
    assert told == [("contract.form", 1, 2), ("probe.answers", 2, 2)]


def test_device_is_found_where_none_is_named() -> None:
    assert run(ReferenceBackend(), only=["contract.form"]).device["kind"] == "cpu"


class NoOffer(Changed):
    def probe(self, devices: Sequence[Device]) -> Sequence[Offer | Refusal]:
        return [Refusal(d.id, "failed", "not today") for d in devices]


def test_mistakes_of_the_caller_are_errors_that_help() -> None:
    with pytest.raises(OptionError, match=r"no check is named 'state\.forks'.*Did you mean \"state\.fork\""):
        run(Changed(), CPU, only=["state.forks"])
    with pytest.raises(OptionError, match="float8"):
        run(Changed(), CPU, precision="float8")
    with pytest.raises(OptionError, match="not today"):
        run(NoOffer())


def test_names_of_checks_are_unique_and_each_says_what_it_demands() -> None:
    checks = all_checks()
    assert len({c.name for c in checks}) == len(checks)
    assert all(c.doc for c in checks)


# comparing ------------------------------------------------------------------------------------------------------------
def test_error_does_not_depend_on_the_size_of_the_numbers(rng: np.random.Generator) -> None:
    a = rng.standard_normal(100).astype(np.float32)
    b = a * np.float32(1.001)
    assert normalized_error(b, a) == pytest.approx(1e-3, rel=1e-2)
    assert normalized_error(b * 1e6, a * 1e6) == pytest.approx(normalized_error(b, a), rel=1e-3)
    assert normalized_error(a, a) == 0
    assert normalized_error(np.zeros(3), np.zeros(3)) == 0
    assert normalized_error(np.float32([1, np.nan]), np.float32([1, 2])) == float("inf")
    assert normalized_error(np.float32([1, np.inf]), np.float32([1, np.inf])) == 0
    assert normalized_error(np.float32([1, -np.inf]), np.float32([1, np.inf])) == float("inf")


def test_shape_type_and_integers_must_be_equal() -> None:
    with pytest.raises(Failed, match="shape"):
        compare(np.zeros((2, 1), np.float32), np.zeros(2, np.float32), 1, "x")
    with pytest.raises(Failed, match="float64"):
        compare(np.zeros(2), np.zeros(2, np.float32), 1, "x")
    with pytest.raises(Failed, match="1 of 2 values differ"):
        compare(np.int64([1, 2]), np.int64([1, 3]), 1, "x")


def test_one_wrong_row_is_found(rng: np.random.Generator) -> None:
    wanted = rng.standard_normal((1000, 8)).astype(np.float32)
    got = wanted.copy()
    got[777] *= np.float32(1.1)
    with pytest.raises(Failed, match="row 777 of 1000"):
        compare_rows(got, wanted, 0.05, "logits")


def test_top_k_may_differ_only_among_near_ties() -> None:
    logits = np.float32([1.0, 2.0, 2.00001, 0.0])
    ids, values = np.int64([1, 2]), np.float32([2.0, 2.0])
    compare_best((ids, values), logits, 2, 1e-4, "x")
    with pytest.raises(Failed, match="did not return the 2 best"):
        compare_best((np.int64([1, 0]), np.float32([2.0, 1.0])), logits, 2, 1e-4, "x")
    with pytest.raises(Failed, match="not the logits of their ids"):
        compare_best((ids, np.float32([3.0, 2.0])), logits, 2, 1e-4, "x")
    with pytest.raises(Failed, match="an id twice"):
        compare_best((np.int64([2, 2]), values), logits, 2, 1e-4, "x")
