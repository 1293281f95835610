"""The session: a cache that grows, long prompts in pieces, failures that change nothing, and damaged files.

Draws: float32 sums in another order differ by about 1e-6 of their size; the tolerances are ten times that or more.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from onnx_making import CPU, Made, logits, made, options
from parted import parted, reference

from transom.contract import Artifact, Work
from transom.errors import EngineError, MissingExtra
from transom.graph import Graph
from transom.testing.models import tiny_decoder
from transom_mobile_export.onnx import running
from transom_mobile_export.onnx.loading import load_artifact

CONTEXT = 700


@pytest.fixture
def graph(rng: np.random.Generator) -> Graph:
    return tiny_decoder(rng, context=CONTEXT, window=9)


@pytest.fixture
def it(graph: Graph, tmp_path: Path) -> Made:
    return made(graph, tmp_path, precision="exact")


def test_a_cache_grows_as_it_is_needed(graph: Graph, it: Made, rng: np.random.Generator) -> None:
    state, sizes = it.session.new_state(), []
    parts = parted(rng, 61, [200, 1, 100, 1, 390])
    found = []
    for part in parts:
        found.append(np.asarray(it.session.step([Work(state, part, "all")])[0]))
        sizes.append(state.nbytes)
    assert np.abs(np.concatenate(found) - reference(graph, parts)).max() < 1e-4
    token = 2 * 2 * 2 * 16 * 4  # bytes: layers, keys and values, KV heads, columns, float32
    assert sizes == [256 * token, 256 * token, 512 * token, 512 * token, 768 * token]
    state.free()
    assert state.nbytes == 0


def test_a_long_prompt_runs_in_pieces(
    it: Made, graph: Graph, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    (prompt,) = parted(rng, 61, [100])
    wanted = reference(graph, [prompt])
    monkeypatch.setattr(running, "CHUNK", 32)
    assert np.abs(logits(it.session, [prompt]) - wanted).max() < 1e-4
    state = it.session.new_state()
    assert it.session.step([Work(state, prompt[:50], "none")]) == [None]
    last = np.asarray(it.session.step([Work(state, prompt[50:])])[0])
    assert np.abs(last - wanted[-1]).max() < 1e-4


def test_a_fork_is_a_state_of_its_own(it: Made, graph: Graph, rng: np.random.Generator) -> None:
    prompt, one, other = parted(rng, 61, [30, 5, 5])
    state = it.session.new_state()
    it.session.step([Work(state, prompt)])
    fork = state.fork(20)
    a, b = it.session.step([Work(state, one, "all"), Work(fork, other, "all")])
    assert np.abs(np.asarray(a) - reference(graph, [prompt, one])[30:]).max() < 1e-4
    assert np.abs(np.asarray(b) - reference(graph, [prompt[:20], other])[20:]).max() < 1e-4


def test_a_step_that_fails_changes_nothing(it: Made, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, more = parted(rng, 61, [20, 9, 4])
    states = [it.session.new_state(), it.session.new_state()]
    it.session.step([Work(s, t) for s, t in zip(states, (first, second), strict=True)])
    run, calls = it.session._engine._run, []

    def fails(*given: object) -> object:
        calls.append(given)
        if len(calls) == 2:
            raise EngineError("it broke")
        return run(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(it.session._engine, "_run", fails)
    with pytest.raises(EngineError, match="it broke"):
        it.session.step([Work(s, more) for s in states])
    monkeypatch.undo()
    assert [s.length for s in states] == [20, 9]
    again = it.session.step([Work(s, more, "all") for s in states])
    for got, before in zip(again, (first, second), strict=True):
        assert np.array_equal(np.asarray(got), logits(it.session, [before, more])[len(before) :])


def test_states_are_written_down_and_made_again(it: Made, rng: np.random.Generator) -> None:
    prompt, more = parted(rng, 61, [33, 3])
    state = it.session.new_state()
    it.session.step([Work(state, prompt)])
    saved = {name: np.asarray(array) for name, array in it.session.save(state).items()}
    assert saved["past_key_values.0.key"].shape == (2, 33, 16)
    other = load_artifact(it.artifact, CPU, options()).restore(33, saved)
    own = np.asarray(it.session.step([Work(state, more)])[0])
    assert np.array_equal(np.asarray(other.session.step([Work(other, more)])[0]), own)
    with pytest.raises(ValueError, match=r"past_key_values.0.key does not fit a state of 32 tokens"):
        it.session.restore(32, saved)
    with pytest.raises(ValueError, match=r"701 tokens exceed"):
        it.session.restore(701, {})


def test_a_closed_session_says_so(it: Made) -> None:
    it.session.close()
    it.session.close()
    with pytest.raises(RuntimeError, match="closed"):
        it.session.new_state()


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_are_those_asked_for(it: Made, threads: int) -> None:
    session = load_artifact(it.artifact, CPU, options(threads=threads))
    assert session._engine._session.get_session_options().intra_op_num_threads == threads


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "decoder.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "other"])
def test_damaged_files_are_errors(it: Made, name: str, damage: str) -> None:
    path = it.files[name]
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif name != "model.onnx.data":  # whose content only the hash in a manifest can tell
        path.write_bytes(b"{}" * 100)
    else:
        path.write_bytes(b"")
    with pytest.raises(EngineError) as error:
        load_artifact(it.artifact, CPU, options())
    assert "transom cache clear" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_artifact_without_its_model_is_an_error(it: Made) -> None:
    files = {name: path for name, path in it.files.items() if name != "model.onnx.data"}
    with pytest.raises(EngineError, match="damaged"):
        load_artifact(Artifact(files, it.artifact.requires), CPU, options())


def test_a_runtime_that_is_not_there_is_an_error(it: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtra, match=r"pip install 'transom\[onnx\]'"):
        load_artifact(it.artifact, CPU, options())
