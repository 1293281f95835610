"""Which slots run together, and that the tokens of other sequences never change.

Draws: what is compared must be equal, whatever the numbers are.
"""

from __future__ import annotations

import numpy as np
import pytest
from rtx_networks import VOCABULARY, CountingExecutor, counting_network, logits_of

from transom.contract import OutOfPages, Work
from transom.errors import EngineError
from transom.sessions import PagedState
from transom.testing.models import tiny_decoder
from transom_tensorrt.engine import Run, SlotEngine, pieces, runs
from transom_tensorrt.network import ShapeProfile
from transom_tensorrt.session import SlotSession


def free(slot: int) -> int:
    return 0


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ([], []),
        ([3], [(3, 1)]),
        ([0, 1, 2, 3], [(0, 4)]),
        ([0, 3], [(0, 4)]),
        ([0, 4], [(0, 1), (4, 1)]),
        ([1, 2, 4, 5, 6], [(1, 4), (5, 2)]),
    ],
)
def test_neighbors_run_together_and_gaps_are_bridged(wanted: list[int], expected: list[tuple[int, int]]) -> None:
    assert runs(wanted, 4, free, 100) == [Run(*r) for r in expected]


def test_a_gap_is_bridged_only_where_that_reads_less_than_the_weights() -> None:
    assert runs([0, 3], 8, lambda slot: 50, 100) == [Run(0, 4)]
    assert runs([0, 3], 8, lambda slot: 51, 100) == [Run(0, 1), Run(3, 1)]


def test_a_slot_that_must_not_be_touched_parts_its_neighbors() -> None:
    assert runs([0, 2, 4], 8, lambda slot: None if slot == 1 else 0, 100) == [Run(0, 1), Run(2, 3)]


def test_runs_cover_what_is_wanted_once_and_nothing_forbidden(rng: np.random.Generator) -> None:
    for _ in range(200):
        slots = int(rng.integers(1, 30))
        wanted = [s for s in range(slots) if rng.random() < 0.4]
        full = {s for s in range(slots) if s not in wanted and rng.random() < 0.3}
        most = int(rng.integers(1, 9))
        found = runs(wanted, most, lambda slot, full=full: None if slot in full else 1, int(rng.integers(0, 5)))
        covered = [s for run in found for s in range(run.first, run.first + run.count)]
        assert len(covered) == len(set(covered))
        assert set(wanted) <= set(covered)
        assert not full & set(covered)
        assert all(run.count <= most for run in found)


@pytest.mark.parametrize(
    ("tokens", "rows", "expected"),
    [
        (3, [], [(0, 3)]),
        (10, [9], [(0, 4), (4, 8), (8, 10)]),
        (4, [0, 1, 2, 3], [(0, 2), (2, 4)]),
        (5, [0, 3, 4], [(0, 4), (4, 5)]),
        (4, [1, 2, 3], [(0, 3), (3, 4)]),
    ],
)
def test_a_prompt_is_cut_to_what_a_run_takes(tokens: int, rows: list[int], expected: list[tuple[int, int]]) -> None:
    assert list(pieces(tokens, rows, ShapeProfile((1, 1, 1), (1, 4, 4), (1, 1, 2)))) == expected


class MadeUp(Exception):
    """A failure of the executor's."""


# over a session -------------------------------------------------------------------------------------------------------
class Rig:
    """A session over a `CountingExecutor`, and what each state should hold."""

    def __init__(self, rng: np.random.Generator, slots: int, weight_bytes: int = 1 << 20, least: int = 1) -> None:
        self.network = counting_network(least=least)
        self.executor = CountingExecutor(self.network, weight_bytes)
        engine = SlotEngine(self.network, self.executor, self.executor.allocate(slots))
        decoder = tiny_decoder(rng, vocabulary=VOCABULARY).decoder
        assert decoder is not None
        self.session = SlotSession(engine, decoder, context=self.network.context)
        self.rng = rng
        self.held: dict[PagedState, list[int]] = {}

    def state(self, tokens: int = 0) -> PagedState:
        state = self.session.new_state()
        self.held[state] = []
        if tokens:
            self.step({state: tokens})
        return state

    def step(self, counts: dict[PagedState, int]) -> None:
        """So many random new tokens for each of some states, with logits of every kind."""
        new = {s: self.rng.integers(0, VOCABULARY, n).tolist() for s, n in counts.items()}
        kinds = {s: str(self.rng.choice(["none", "last", "all"])) for s in counts}
        work = [Work(s, new[s], kinds[s]) for s in counts]  # type: ignore[arg-type]
        for (state, kind), got in zip(kinds.items(), self.session.step(work), strict=True):
            before, self.held[state] = self.held[state], self.held[state] + new[state]
            if kind == "none":
                assert got is None
                continue
            want = [logits_of([*before, *new[state][: i + 1]]) for i in range(len(new[state]))]
            np.testing.assert_array_equal(got, want[-1] if kind == "last" else np.stack(want))
        self.check()

    def check(self) -> None:
        """Every state's tokens are where they were."""
        for state, tokens in self.held.items():
            assert state.length == len(tokens)
            if tokens:
                got = self.executor.cache[state.table.pages[0], : len(tokens)]
                np.testing.assert_array_equal(got, tokens)

    def fork(self, state: PagedState, length: int) -> PagedState:
        twin = state.fork(length)
        self.held[twin] = self.held[state][:length]
        return twin

    def truncate(self, state: PagedState, length: int) -> None:
        state.truncate(length)
        del self.held[state][length:]

    def free(self, state: PagedState) -> None:
        state.free()
        del self.held[state]


def test_sequences_with_one_new_token_run_together_and_prompts_alone(rng: np.random.Generator) -> None:
    rig = Rig(rng, 3)
    a, b, c = (rig.state() for _ in range(3))
    rig.session.step([Work(a, [1]), Work(b, [2, 3, 4]), Work(c, [5])])
    assert rig.executor.ran == [("prefill", 1, 1, 3), ("decode", 0, 3, 1)]


def test_a_prompt_too_short_for_a_run_goes_token_by_token(rng: np.random.Generator) -> None:
    rig = Rig(rng, 3, least=3)
    a, b, c = (rig.state() for _ in range(3))
    rig.session.step([Work(a, [1, 2]), Work(b, [3, 4, 5]), Work(c, [6])])
    assert rig.executor.ran == [("prefill", 1, 1, 3), ("decode", 0, 3, 1), ("decode", 0, 1, 1)]
    rig.session.step([Work(a, [1, 2, 3, 4, 5])])
    assert rig.executor.ran[3:] == [("prefill", 0, 1, 4), ("decode", 0, 1, 1)]


def test_an_idle_sequence_within_a_run_keeps_its_tokens(rng: np.random.Generator) -> None:
    rig = Rig(rng, 3)
    a, _idle, c = rig.state(2), rig.state(5), rig.state(3)
    rig.executor.ran.clear()
    rig.step({a: 1, c: 1})
    assert rig.executor.ran == [("decode", 0, 3, 1)]
    rig.step({_idle: 1})


def test_a_full_sequence_is_not_within_a_run_of_others(rng: np.random.Generator) -> None:
    rig = Rig(rng, 3)
    a, full, c = rig.state(2), rig.state(4), rig.state(3)
    rig.step({full: 4})
    rig.executor.ran.clear()
    rig.step({a: 1, c: 1})
    assert rig.executor.ran == [("decode", 0, 1, 1), ("decode", 2, 1, 1)]


def test_the_slot_of_a_freed_full_sequence_separates_no_runs(rng: np.random.Generator) -> None:
    rig = Rig(rng, 3)
    a, full, c = rig.state(2), rig.state(4), rig.state(3)
    rig.step({full: 4})
    rig.free(full)
    rig.executor.ran.clear()
    rig.step({a: 1, c: 1})
    assert rig.executor.ran == [("decode", 0, 3, 1)]


def test_a_full_sequence_is_not_overwritten_after_a_truncation(rng: np.random.Generator) -> None:
    rig = Rig(rng, 3)
    a, full, c = rig.state(2), rig.state(4), rig.state(3)
    rig.step({full: 4})
    twin = rig.fork(full, 8)
    rig.truncate(full, 2)
    rig.step({a: 1, c: 1})
    rig.check()
    assert twin.length == 8


def test_a_prompt_in_the_same_step_as_a_run_over_its_slot_is_kept(rng: np.random.Generator) -> None:
    rig = Rig(rng, 3)
    a, b, c = rig.state(1), rig.state(), rig.state()
    rig.step({b: 4, c: 1, a: 1})


def test_where_weights_are_cheap_idle_sequences_are_left_out(rng: np.random.Generator) -> None:
    rig = Rig(rng, 3, weight_bytes=1)
    a, _, c = rig.state(2), rig.state(5), rig.state(3)
    rig.executor.ran.clear()
    rig.step({a: 1, c: 1})
    assert rig.executor.ran == [("decode", 0, 1, 1), ("decode", 2, 1, 1)]


@pytest.mark.parametrize("least", [1, 3])
def test_no_operation_changes_the_tokens_of_other_sequences(rng: np.random.Generator, least: int) -> None:
    rig = Rig(rng, 7, least=least)
    context = rig.network.context
    full = failed = 0
    for _ in range(400):
        states = list(rig.held)
        rng.shuffle(states)  # type: ignore[arg-type]
        what = rng.choice(["new", "step", "step", "step", "fork", "truncate", "free", "fail"])
        if what == "new" or not states:
            rig.state()
        elif what in ("step", "fail"):
            some = [s for s in states[: int(rng.integers(1, 6))] if s.length < context]
            counts = {s: int(rng.integers(1, 1 + min(6, context - s.length))) for s in some}
            rig.executor.fail = MadeUp() if what == "fail" else None
            try:
                rig.step(counts)
            except OutOfPages:
                rig.free(states[-1])
                full += 1
            except MadeUp:
                failed += 1
        elif what == "fork":
            rig.fork(states[0], int(rng.integers(0, states[0].length + 1)))
        elif what == "truncate":
            rig.truncate(states[0], int(rng.integers(0, states[0].length + 1)))
        else:
            rig.free(states[0])
        rig.check()
    assert full, "the pool is small enough to run out"
    assert failed
    for state in list(rig.held):
        rig.free(state)
    assert rig.session.pages() == (7, 7)


def test_logits_that_are_not_finite_are_an_error_for_their_sequence_alone(rng: np.random.Generator) -> None:
    """A value behind a sequence's tokens is seen by no token, and yet nought times NaN is NaN."""
    rig = Rig(rng, 2)
    a = rig.state(3)
    slot = a.table.pages[0]

    def spoilt(*given: object) -> np.ndarray:  # type: ignore[type-arg]
        got = CountingExecutor.run(rig.executor, *given)  # type: ignore[arg-type]
        rig.executor.cache[slot, 3:] = np.nan
        return np.full_like(got, np.nan)

    rig.executor.run = spoilt  # type: ignore[method-assign, assignment]
    with pytest.raises(EngineError, match="not finite"):
        rig.session.step([Work(a, [1, 2])])
    del rig.executor.run  # type: ignore[method-assign]
    rig.check()
    (got,) = rig.session.step([Work(a, [4])])
    np.testing.assert_array_equal(got, logits_of([*rig.held[a], 4]))


def test_a_fatal_card_error_is_reported_rather_than_the_failed_cleanup(rng: np.random.Generator) -> None:
    rig = Rig(rng, 3)
    a, b, c = (rig.state(2) for _ in range(3))
    asked = []

    def burning(slot: int, start: int) -> None:
        asked.append((slot, start))
        raise EngineError("cuda:0 cannot clear memory", "")

    rig.executor.clear_slot = burning  # type: ignore[method-assign]
    rig.executor.fail = EngineError("the card is on fire", "")
    with pytest.raises(EngineError, match="the card is on fire"):
        rig.session.step([Work(state, [1, 2]) for state in (a, b, c)])
    assert asked == [(state.table.pages[0], 2) for state in (a, b, c)]


@pytest.mark.parametrize("how", ["new", "one token", "fork", "restore"])
def test_a_reused_slot_shows_nothing_of_its_former_sequence(rng: np.random.Generator, how: str) -> None:
    rig = Rig(rng, 2)
    kept = rig.state(3)
    saved = rig.session.save(kept)
    gone = rig.state(4)
    rig.executor.cache[gone.table.pages[0]] = np.nan
    rig.free(gone)
    if how in ("new", "one token"):
        rig.state(1 if how == "one token" else 2)
    elif how == "fork":
        twin = rig.fork(kept, 2)
        rig.step({twin: 1})
    else:
        state = rig.session.restore(3, saved)
        rig.held[state] = list(rig.held[kept])
        rig.step({state: 1})
    assert np.isfinite(rig.executor.cache).all()


def test_a_step_that_fails_leaves_states_as_they_were(rng: np.random.Generator) -> None:
    rig = Rig(rng, 4)
    a, b = rig.state(2), rig.state(3)
    c = rig.fork(b, 2)
    pages = rig.session.pages()
    rig.executor.fail = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        rig.session.step([Work(a, [1, 2, 3]), Work(c, [4])])
    rig.check()
    assert rig.session.pages() == pages
    rig.step({a: 3, c: 1, b: 1})


def test_logits_belong_to_the_caller(rng: np.random.Generator) -> None:
    rig = Rig(rng, 2)
    a = rig.state()
    (first,) = rig.session.step([Work(a, [5])])
    kept = np.array(first)
    rig.session.step([Work(a, [6])])
    np.testing.assert_array_equal(first, kept)


def test_an_engine_has_no_more_pages_than_slots() -> None:
    network = counting_network()
    engine = SlotEngine(network, CountingExecutor(network), 2)
    with pytest.raises(ValueError, match="3 pages, but only 2 slots"):
        engine.bind_pages(3)
