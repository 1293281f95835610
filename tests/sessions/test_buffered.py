"""Sessions over arrays that an engine writes to in place: room, forks, cuts, failures, and what is written down.

Draws: what is compared must be equal, whatever the numbers are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from transom.contract import Limits, SavingSession, Work
from transom.sessions import BufferedSession

VOCABULARY, CONTEXT, GRAIN, PAIR = 11, 40, 8, 2
Array = np.ndarray[Any, np.dtype[Any]]


class Remembering:
    """Its logits say which tokens are in the cache: a token at position p counts (p + 1) in its column. Tokens are kept
    one by one, and their sums in pairs of positions."""

    def __init__(self) -> None:
        self.calls = 0
        self.fails_at = 0
        self.closed = 0

    def capacity(self, tokens: int) -> int:
        return -(-tokens // GRAIN) * GRAIN

    def new_buffers(self, capacity: int) -> dict[str, Array]:
        return {
            "one": np.full((1, 2, capacity, 3), -1, np.int16),
            "pair": np.full((1, 1, -(-capacity // PAIR), 1), np.nan, np.float32),
        }

    def rows(self, name: str, tokens: int) -> int:
        return -(-tokens // PAIR) if name == "pair" else tokens

    def compute(self, tokens: Array, past: int, buffers: Any, *, every: bool) -> Array:
        self.calls += 1
        one, pair = buffers["one"][0, 1, :, 2], buffers["pair"][0, 0, :, 0]
        one[past : past + len(tokens)] = tokens
        rows = []
        for end in range(past + 1, past + len(tokens) + 1):
            pair[(end - 1) // PAIR] = one[(end - 1) // PAIR * PAIR : end].sum()
            assert pair[: -(-end // PAIR)].sum() == one[:end].sum()
            rows.append(np.bincount(one[:end], np.arange(1, end + 1), VOCABULARY))
        if self.calls == self.fails_at:
            raise MemoryError("it broke")
        return np.asarray(rows if every else rows[-1:], np.float32)

    def close(self) -> None:
        self.closed += 1


def counted(ids: Sequence[int]) -> Array:
    """What the engine has to say of these tokens, float32 [tokens, vocabulary]."""
    seen = np.zeros((len(ids), VOCABULARY), np.float32)
    for position, token in enumerate(ids):
        seen[position:, token] += position + 1
    return seen


def session(engine: Remembering | None = None) -> BufferedSession:
    return BufferedSession(engine or Remembering(), VOCABULARY, Limits(4, 64, CONTEXT, 0))


def ids(rng: np.random.Generator, count: int) -> list[int]:
    return [int(i) for i in rng.integers(0, VOCABULARY, count)]


def test_several_ragged_sequences(rng: np.random.Generator) -> None:
    it = session()
    assert isinstance(it, SavingSession)
    tokens = [ids(rng, n) for n in (30, 7, 12)]
    states = [it.new_state() for _ in tokens]
    held: list[list[int]] = [[], [], []]
    for sizes in ((5, 1, 12), (24, 6), (1,)):
        work, expected = [], []
        for i, size in enumerate(sizes):
            at = len(held[i])
            held[i] += tokens[i][at : at + size]
            wants = ("all", "last", "none")[i]
            work.append(Work(states[i], tokens[i][at : at + size], wants))  # type: ignore[arg-type]
            rows = counted(held[i])[at:]
            expected.append({"all": rows, "last": rows[-1], "none": None}[wants])
        for got, want in zip(it.step(work), expected, strict=True):
            np.testing.assert_array_equal(got, want)  # type: ignore[arg-type]
    assert [s.length for s in states] == [30, 7, 12]
    best, values = it.step([Work(states[0], tokens[0][:1], top_k=2)])[0]  # type: ignore[misc]
    row = counted([*tokens[0], tokens[0][0]])[-1]
    assert values.tolist() == sorted(row.tolist(), reverse=True)[:2]
    assert row[best].tolist() == values.tolist()


def test_room_grows_twofold_up_to_the_context(rng: np.random.Generator) -> None:
    it = session()
    state = it.new_state()
    assert state.nbytes == 0
    sizes = []
    for count in (3, 6, 9, 22):
        it.step([Work(state, ids(rng, count), "none")])
        sizes.append(state.nbytes // (2 * 3 * 2 + 4 // PAIR))
    assert sizes == [8, 16, 32, 40]
    with pytest.raises(ValueError, match="exceed the context of 40"):
        it.step([Work(state, [1])])
    state.free()
    assert state.nbytes == state.length == 0


def test_forks_and_cuts(rng: np.random.Generator) -> None:
    it = session()
    state, first, one, other = it.new_state(), ids(rng, 9), ids(rng, 3), ids(rng, 4)
    it.step([Work(state, first)])
    fork = state.fork(5)
    a, b = it.step([Work(state, one, "all"), Work(fork, other, "all")])
    np.testing.assert_array_equal(a, counted(first + one)[9:])  # type: ignore[arg-type]
    np.testing.assert_array_equal(b, counted(first[:5] + other)[5:])  # type: ignore[arg-type]
    state.truncate(3)
    np.testing.assert_array_equal(it.step([Work(state, other)])[0], counted(first[:3] + other)[-1])  # type: ignore[arg-type]
    for change in (state.fork, state.truncate):
        with pytest.raises(ValueError, match="holds 7 tokens"):
            change(8)
        with pytest.raises(ValueError, match="holds 7 tokens"):
            change(-1)
    state.free()
    for change in (state.fork, state.truncate):
        with pytest.raises(RuntimeError, match="freed"):
            change(0)
    with pytest.raises(RuntimeError, match="freed"):
        it.step([Work(state, [1])])


def test_a_step_that_fails_changes_nothing(rng: np.random.Generator) -> None:
    engine = Remembering()
    it = session(engine)
    states, firsts, more = [it.new_state(), it.new_state()], [ids(rng, 5), ids(rng, 8)], ids(rng, 9)
    it.step([Work(s, f) for s, f in zip(states, firsts, strict=True)])
    engine.fails_at = 4
    with pytest.raises(MemoryError, match="it broke"):
        it.step([Work(s, more) for s in states])
    assert [s.length for s in states] == [5, 8]
    for got, first in zip(it.step([Work(s, more, "all") for s in states]), firsts, strict=True):
        np.testing.assert_array_equal(got, counted(first + more)[len(first) :])  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [0, 7, 8])
def test_states_are_written_down_and_made_again(rng: np.random.Generator, count: int) -> None:
    it, tokens, more = session(), ids(rng, count), ids(rng, 3)
    state = it.new_state()
    if tokens:
        it.step([Work(state, tokens)])
    saved = {name: np.asarray(array) for name, array in it.save(state).items()}
    assert {n: a.shape for n, a in saved.items()} == {"one": (2, count, 3), "pair": (1, -(-count // PAIR), 1)}
    other = session().restore(count, saved)
    assert other.length == count
    np.testing.assert_array_equal(other.session.step([Work(other, more)])[0], counted(tokens + more)[-1])  # type: ignore[arg-type]
    wrong: list[tuple[int, dict[str, Any]]] = [
        (count + 1, saved), (-1, saved), (CONTEXT + 1, saved), (count, {}),
        (count, saved | {"one": saved["one"].astype(np.int32)}), (count, saved | {"pair": saved["one"]}),
    ]  # fmt: skip
    for length, arrays in wrong:
        with pytest.raises(ValueError, match="tokens"):
            it.restore(length, arrays)


def test_what_belongs_elsewhere_and_what_is_closed(rng: np.random.Generator) -> None:
    engine = Remembering()
    it = session(engine)
    with pytest.raises(ValueError, match="another session"):
        it.step([Work(session().new_state(), [1])])
    with pytest.raises(RuntimeError, match="call step"):
        it.run({})
    state = it.new_state()
    it.close()
    it.close()
    assert engine.closed == 1
    for use in (it.new_state, lambda: it.step([Work(state, [1])]), lambda: it.save(state), lambda: it.restore(0, {})):
        with pytest.raises(RuntimeError, match="closed"):
            use()
