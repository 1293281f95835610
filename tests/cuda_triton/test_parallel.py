"""Two processes run one model, in Triton's interpreter, with sums by gloo: the logits are those of one.

Draws: float32 sums in another order differ by about 1e-6 of their size; the tolerances are ten times that or more.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_generation import BACKEND, SPARSE, cpu, drawn, stored

from transom.contract import Artifact, Work
from transom.errors import EngineError
from transom.graph import Graph
from transom.testing.bench import ReferenceOracle
from transom.testing.models import tiny_decoder
from transom_cuda_triton import parallel
from transom_cuda_triton.parallel import Team
from transom_cuda_triton.session import TritonSession

GROUP = replace(cpu(), id="cpu,cpu", members=(cpu(), replace(cpu(), id="cpu:1")))


def stored_for_two(graph: Graph, folder: Path) -> Artifact:
    refused = [c for c in BACKEND.claim(graph, GROUP, {}) if not c.ok]
    assert not refused, refused[0].reason
    return stored(graph, folder, device=GROUP)


@pytest.fixture
def graph(rng: np.random.Generator) -> Graph:
    forms = {"weights": "int4", "inner": 128, "linear_bias": True, "sinks": True, "window": 90}
    return tiny_decoder(rng, q_heads=4, kv_heads=2, context=400, **forms)


@pytest.fixture
def session(graph: Graph, tmp_path: Path) -> Iterator[TritonSession]:
    opened = BACKEND.load(stored_for_two(graph, tmp_path), GROUP, {}, tmp_path)
    assert isinstance(opened, TritonSession)
    assert isinstance(opened._triton, Team)
    yield opened
    opened.close()


def test_logits_are_those_of_one_device(session: TritonSession, graph: Graph, rng: np.random.Generator) -> None:
    """A ragged batch, decoding, a fork with a page that is copied."""
    oracle, a, b = ReferenceOracle(graph), drawn(rng, 100), drawn(rng, 20)
    states = [session.new_state(), session.new_state()]
    for state, tokens in zip(states, (a, b), strict=True):
        (rows,) = session.step([Work(state, tokens[:-2], "all")])
        np.testing.assert_allclose(np.asarray(rows), oracle.logits(tokens)[:-2], atol=1e-4)
    fork = states[0].fork(98)
    rows = session.step([Work(states[0], a[-2:]), Work(states[1], b[-2:]), Work(fork, [5])])
    for row, tokens in zip(rows, (a, b, [*a[:98], 5]), strict=True):
        np.testing.assert_allclose(np.asarray(row), oracle.logits(tokens)[-1], atol=1e-4)


@pytest.mark.sweep  # interpreted
def test_sparse_steps_and_their_counts_are_those_of_one_device(
    session: TritonSession, graph: Graph, tmp_path: Path, rng: np.random.Generator
) -> None:
    """With a policy whose heads differ, so that each card needs its own."""
    policy = SPARSE.with_heads(((1.0, 0.0), (0.5, 2.0))).to_string()
    alone = BACKEND.load(stored(graph, tmp_path / "alone"), cpu(), {}, tmp_path)
    tokens = drawn(rng, 230)
    rows, counts = [], []
    for each in (session, alone):
        state = each.new_state()
        each.step([Work(state, tokens[:-1], sparsity=policy)])
        (row,) = each.step([Work(state, tokens[-1:], sparsity=policy)])
        rows.append(np.asarray(row))
        assert isinstance(each, TritonSession)
        counts.append(np.asarray(each.keys_read(state)))
    np.testing.assert_array_equal(*counts)
    assert counts[0][0].sum() < counts[0][1].sum()
    np.testing.assert_allclose(*rows, atol=1e-4)
    alone.close()


def test_a_process_that_dies_is_an_error_and_no_hang(session: TritonSession, rng: np.random.Generator) -> None:
    state = session.new_state()
    session.step([Work(state, [1, 2, 3])])
    team = session._triton
    assert isinstance(team, Team)
    process = team.followers[0]._process
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    for _ in range(2):
        with pytest.raises(EngineError, match=r"ended|cards failed"):
            session.step([Work(state, [4])])
    assert state.length == 3


def test_closing_leaves_no_process(graph: Graph, tmp_path: Path) -> None:
    session: Any = BACKEND.load(stored_for_two(graph, tmp_path), GROUP, {}, tmp_path)
    process = session._triton.followers[0]._process
    session.close()
    assert process.exitcode == 0


@pytest.mark.parametrize("met", [True, False], ids=["met", "gone"])
@pytest.mark.sweep(but=("gone",))  # interpreted
def test_a_share_that_cannot_be_opened_is_an_error(
    met: bool, graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its process is gone before the leader has met it."""

    meet = parallel.Sums

    def gone(*seat: Any, **how: Any) -> None:
        meet(*seat, **how)
        raise RuntimeError("Gloo connectFullMesh failed: Connection closed by peer")

    if not met:
        monkeypatch.setattr(parallel, "Sums", gone)
    artifact = stored_for_two(graph, tmp_path)
    path = artifact.files["weights-1.bin"]
    assert isinstance(path, Path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(EngineError, match="damaged"):
        BACKEND.load(artifact, GROUP, {}, tmp_path)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"q_heads": 3, "kv_heads": 3}, "cannot share evenly"),
        ({"weights": "int4", "inner": 96}, "blocks of 32 columns"),
    ],
)
def test_what_cannot_be_shared_is_refused(settings: dict[str, Any], says: str, rng: np.random.Generator) -> None:
    graph = tiny_decoder(rng, **settings)
    reasons = [c.reason for c in BACKEND.claim(graph, GROUP, {}) if not c.ok]
    assert reasons
    assert all(says in reason for reason in reasons)
