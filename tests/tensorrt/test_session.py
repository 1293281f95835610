"""Sessions over the emulated network, compared with the NumPy reference.

Draws: float16 agrees to 3e-2, and float32 to 1e-3, tens of times their rounding.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rtx_networks import CPU, Compiled, compiled

from transom.contract import Limits, OutOfPages, SavingSession, Work
from transom.errors import EngineError
from transom.ops.sparse_routing import COLUMN_ROWS
from transom.preparation.reference_outputs import reference_logits
from transom.reference.executor import Executor
from transom.sessions import PackedSession
from transom.sparsity import Sparsity
from transom.testing.models import VARIANTS
from transom_tensorrt.emulating import OnnxExecutor
from transom_tensorrt.engine import SlotEngine
from transom_tensorrt.executing import Array
from transom_tensorrt.loading import load_artifact
from transom_tensorrt.session import SlotSession

TOLERANCE = {"atol": 3e-2, "rtol": 3e-2}
"""Of float16."""


@pytest.fixture
def made(rng: np.random.Generator, tmp_path: Path) -> Compiled:
    return compiled(rng, tmp_path / "model", q_heads=4, kv_heads=2)


def opened(made: Compiled, slots: int) -> SlotSession:
    executor = OnnxExecutor(made.network, made.model, slots=slots)
    return SlotSession(
        SlotEngine(made.network, executor, executor.allocate(99)), made.decoder, context=made.network.context
    )


def draw(rng: np.random.Generator, made: Compiled, count: int) -> list[int]:
    found: list[int] = rng.integers(0, made.network.vocabulary, count).tolist()
    return found


def close(got: Any, want: Array) -> None:
    np.testing.assert_allclose(got, want, **TOLERANCE)


@pytest.mark.parametrize("form", ["gqa", "window", "softcap", "sinks", "int4", "uint4_minimums", "everything"])
def test_logits_are_the_references(rng: np.random.Generator, tmp_path: Path, form: str) -> None:
    kinds = {k: v for k, v in VARIANTS[form].items() if k != "attention_bias"}
    made = compiled(rng, tmp_path, number="float32", **kinds)
    session = load_artifact(made.artifact(), CPU, {}, tmp_path)
    ids = draw(rng, made, 30)
    state = session.new_state()
    got = [session.step([Work(state, ids[:21], "all")])[0]]  # longer than a run takes, in tokens and in rows
    got += [session.step([Work(state, [i], "all")])[0] for i in ids[21:]]
    np.testing.assert_allclose(np.concatenate(got), reference_logits(made.graph, ids), atol=1e-3, rtol=1e-3)
    session.close()


def test_a_sparse_network_reads_what_the_reference_reads(rng: np.random.Generator, tmp_path: Path) -> None:
    """Beside caches it keeps what it chooses by, of which a slot has fewer rows than tokens."""
    policy = Sparsity(1.0, columns=0, top_k=3, dense_below=0, max_density=0.6)
    sizes = {"context": 600, "tokens": 400, "rows": 400, "least": COLUMN_ROWS, "number": "float32"}
    made = compiled(rng, tmp_path, policy=policy, **sizes)  # type: ignore[arg-type]
    assert len({kept.shape[1] for kept in made.network.kept}) == 2
    assert made.network.context not in {kept.shape[1] for kept in made.network.kept}
    session = opened(made, 6)
    wanted = PackedSession(Executor(made.graph).run, made.decoder, Limits(8, 4096, 4096, 0))
    states = [(s.new_state(), wanted.new_state()) for s in [session] * 4]

    def step(*counts: tuple[int, int]) -> None:
        texts = [draw(rng, made, n) for _, n in counts]
        both = []
        for side, run in enumerate((session, wanted)):
            works = [Work(states[i][side], text, "all") for (i, _), text in zip(counts, texts, strict=True)]
            both.append(run.step(works))
        for got, want in zip(*both, strict=True):
            np.testing.assert_allclose(got, want, atol=1e-3, rtol=1e-3)

    step((0, 300), (1, 20), (2, 370), (3, 250))
    step((0, 1), (2, 1))  # 1 is idle between them
    step((1, 1), (3, 5), (0, 40))
    states.append((states[2][0].fork(365), states[2][1].fork(365)))
    step((4, 1), (2, 1))
    states[3][0].truncate(201)
    states[3][1].truncate(201)
    step((3, 2), (0, 1), (1, 1))
    states.append((session.restore(states[0][0].length, session.save(states[0][0])), states[0][1].fork(342)))
    step((5, 1), (0, 1))
    session.close()


def test_a_ragged_step_gives_each_sequence_its_own(rng: np.random.Generator, made: Compiled) -> None:
    session = opened(made, 6)
    texts = [draw(rng, made, n) for n in (7, 1, 20, 2, 9, 1)]
    states = [session.new_state() for _ in texts]
    kinds: list[Any] = ["all", "last", "last", "none", "all", "last"]
    results = session.step([Work(s, t, k) for s, t, k in zip(states, texts, kinds, strict=True)])
    for text, kind, got in zip(texts, kinds, results, strict=True):
        want = reference_logits(made.graph, text)
        if kind == "none":
            assert got is None
        else:
            close(got, want if kind == "all" else want[-1])
    assert [s.length for s in states] == [len(t) for t in texts]
    session.close()


def test_many_sequences_decode_with_gaps_between_them(rng: np.random.Generator, made: Compiled) -> None:
    session = opened(made, 9)
    texts = [draw(rng, made, int(rng.integers(1, 12))) for _ in range(9)]
    states = [session.new_state() for _ in texts]
    for state, text in zip(states, texts, strict=True):
        session.step([Work(state, text, "none")])
    for gone in (2, 6):
        states[gone].free()
    for _ in range(8):
        some = [i for i in range(9) if i not in (2, 6) and rng.random() < 0.6]
        new = draw(rng, made, len(some))
        results = session.step([Work(states[i], [t]) for i, t in zip(some, new, strict=True)])
        for i, token, got in zip(some, new, results, strict=True):
            texts[i].append(token)
            close(got, reference_logits(made.graph, texts[i])[-1])
    session.close()


def test_a_full_sequence_stays_right_beside_others(rng: np.random.Generator, tmp_path: Path) -> None:
    made = compiled(rng, tmp_path, context=16)
    session = opened(made, 3)
    a, full, c = (session.new_state() for _ in range(3))
    text = draw(rng, made, 16)
    session.step([Work(a, text[:4], "none"), Work(full, text[:15], "none"), Work(c, text[:6], "none")])
    session.step([Work(full, text[15:])])
    for n in range(4):
        got = session.step([Work(a, [text[4 + n]]), Work(c, [text[6 + n]])])
        close(got[0], reference_logits(made.graph, text[: 5 + n])[-1])
        close(got[1], reference_logits(made.graph, text[: 7 + n])[-1])
    twin = full.fork(15)
    c.free()  # the last token of a fork needs a slot of its own
    (last,) = session.step([Work(twin, text[15:])])
    close(last, reference_logits(made.graph, text)[-1])
    with pytest.raises(ValueError, match="exceed the context"):
        session.step([Work(full, [1])])
    session.close()


def test_forks_and_truncated_sequences_go_their_own_ways(rng: np.random.Generator, made: Compiled) -> None:
    session = opened(made, 4)
    text, other = draw(rng, made, 12), draw(rng, made, 5)
    state = session.new_state()
    session.step([Work(state, text, "none")])
    twin = state.fork(7)
    assert session.pages() == (4, 3), "a fork takes nothing before it goes on"
    (got,) = session.step([Work(twin, other)])
    close(got, reference_logits(made.graph, text[:7] + other)[-1])
    assert session.pages() == (4, 2)
    state.truncate(3)
    got = session.step([Work(state, other, "all"), Work(twin, [text[0]])])
    close(got[0], reference_logits(made.graph, text[:3] + other)[3:])
    close(got[1], reference_logits(made.graph, text[:7] + other + text[:1])[-1])
    session.close()


def test_when_no_slot_is_free_nothing_changes(rng: np.random.Generator, made: Compiled) -> None:
    session = opened(made, 2)
    a, b, c = (session.new_state() for _ in range(3))
    text = draw(rng, made, 6)
    session.step([Work(a, text, "none"), Work(b, text[:2], "none")])
    with pytest.raises(OutOfPages):
        session.step([Work(a, [1]), Work(c, text)])
    assert (a.length, c.length) == (6, 0)
    assert session.pages() == (2, 0)
    b.free()
    got = session.step([Work(a, text[:1]), Work(c, text)])
    close(got[0], reference_logits(made.graph, [*text, text[0]])[-1])
    close(got[1], reference_logits(made.graph, text)[-1])
    session.close()


def test_a_step_that_fails_in_its_second_run_can_be_repeated(
    rng: np.random.Generator, made: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = opened(made, 3)
    texts = [draw(rng, made, 5), draw(rng, made, 9)]
    a, b = (session.new_state() for _ in texts)
    session.step([Work(a, texts[0][:2], "none")])
    run, calls = OnnxExecutor.run, []

    def failing(self: OnnxExecutor, *given: Any) -> Array:
        calls.append(given)
        if len(calls) == 2:
            raise EngineError("made up", "")
        return run(self, *given)

    work = [Work(a, texts[0][2:], "all"), Work(b, texts[1], "all")]
    with monkeypatch.context() as patch:
        patch.setattr(OnnxExecutor, "run", failing)
        with pytest.raises(EngineError, match="made up"):
            session.step(work)
    assert (a.length, b.length) == (2, 0)
    assert session.pages() == (3, 2)
    got = session.step(work)
    close(got[0], reference_logits(made.graph, texts[0])[2:])
    close(got[1], reference_logits(made.graph, texts[1]))
    session.close()


def test_a_saved_state_is_restored_in_another_session(rng: np.random.Generator, made: Compiled) -> None:
    session, other = opened(made, 2), opened(made, 2)
    assert isinstance(session, SavingSession)
    text = draw(rng, made, 8)
    state = session.new_state()
    session.step([Work(state, text[:7], "none")])
    saved = session.save(state)
    used = other.new_state()
    other.step([Work(used, text[:3], "none")])
    again = other.restore(7, saved)
    (got,) = other.step([Work(again, text[7:])])
    close(got, reference_logits(made.graph, text)[-1])
    empty = other.restore(0, session.save(session.new_state()))
    assert empty.length == 0
    with pytest.raises(OutOfPages):
        other.restore(7, saved)
    session.close()
    other.close()


def test_a_state_can_be_saved_after_the_session_has_warmed_up(made: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may wait for a stream that is being recorded."""
    reading, order = threading.Event(), []

    def warm_up(self: OnnxExecutor) -> None:
        reading.wait(0.5)
        order.append("warm")

    def read_slot(self: OnnxExecutor, slot: int, positions: int) -> dict[str, Array]:
        reading.set()
        order.append("read")
        return {}

    monkeypatch.setattr(OnnxExecutor, "warm_up", warm_up)
    monkeypatch.setattr(OnnxExecutor, "read_slot", read_slot)
    session = opened(made, 2)
    session.save(session.new_state())
    session.close()
    assert order == ["warm", "read"]


def test_arrays_that_are_no_saved_state_are_refused(made: Compiled) -> None:
    session = opened(made, 2)
    state = session.new_state()
    session.step([Work(state, [1, 2, 3], "none")])
    saved = dict(session.save(state))
    name = next(iter(saved))
    for wrong in ({}, {**saved, name: saved[name][:, :2]}, {**saved, name: saved[name].astype(np.float32)}):
        with pytest.raises(ValueError, match=name):
            session.restore(3, wrong)
    with pytest.raises(ValueError, match="exceed the context"):
        session.restore(made.network.context + 1, saved)
    with pytest.raises(ValueError, match="another session"):
        opened(made, 2).save(state)
    assert session.pages() == (2, 1)
    state.free()
    with pytest.raises(RuntimeError, match="freed"):
        session.save(state)
    session.close()


def test_a_failed_restore_takes_no_slot(made: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: OnnxExecutor, slot: int, arrays: Any) -> None:
        raise EngineError("made up", "")

    session = opened(made, 2)
    state = session.new_state()
    session.step([Work(state, [1, 2, 3], "none")])
    saved = session.save(state)
    monkeypatch.setattr(OnnxExecutor, "write_slot", failing)
    with pytest.raises(EngineError, match="made up"):
        session.restore(3, saved)
    assert session.pages() == (2, 1)
    session.close()


def test_closing_twice_closes_once(made: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []
    monkeypatch.setattr(OnnxExecutor, "close", lambda self: closed.append(self))
    session = opened(made, 2)
    session.close()
    session.close()
    assert len(closed) == 1
    with pytest.raises(RuntimeError, match="closed"):
        session.new_state()
