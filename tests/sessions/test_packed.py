"""`PackedSession`: states, ragged steps and all-or-nothing failure over a function that runs a graph once.

Draws: float32 sums in another order differ by about 1e-6 of their size; the tolerances are ten times that or more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from transom.contract import Limits, Session, State, Work
from transom.graph import Graph
from transom.reference.executor import Executor
from transom.sessions import PackedSession, best
from transom.testing.bench import ReferenceOracle
from transom.testing.compare import compare_rows
from transom.testing.models import VARIANTS, tiny_decoder

LIMITS = Limits(max_sequences=4, max_tokens=64, context=96, page_tokens=0)


class Bed:
    """A session over the reference, its oracle, and a place to inject failures."""

    def __init__(self, rng: np.random.Generator, limits: Limits = LIMITS, **form: Any) -> None:
        self.graph: Graph = tiny_decoder(rng, **form)
        self.oracle = ReferenceOracle(self.graph)
        self.executor = Executor(self.graph, keep_weights=True)
        self.spoil: Callable[[dict[str, Any]], Mapping[str, Any]] | None = None
        self.calls: list[dict[str, Any]] = []
        self.closed = 0
        self.session = PackedSession(self._run, self.graph.decoder, limits, self._close)

    def _run(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        self.calls.append(dict(inputs))
        outputs = self.executor.run(inputs)
        return outputs if self.spoil is None else self.spoil(outputs)

    def _close(self) -> None:
        self.closed += 1

    def filled(self, tokens: list[int]) -> State:
        state = self.session.new_state()
        self.session.step([Work(state, tokens, "none")])
        return state

    def expect(self, state: State, history: list[int], more: list[int]) -> None:
        got = self.session.step([Work(state, more, "all")])[0]
        compare_rows(got, self.oracle.logits(history + more)[len(history) :], 1e-5, "logits")


@pytest.fixture
def bed(rng: np.random.Generator) -> Bed:
    return Bed(rng)


def test_it_is_a_session_of_the_contract(bed: Bed) -> None:
    assert isinstance(bed.session, Session)
    assert isinstance(bed.session.new_state(), State)
    assert bed.session.pages() == (0, 0)
    assert bed.session.limits is LIMITS


@pytest.mark.parametrize("variant", ["gqa", "window", "value_width", "everything"])
def test_ragged_step_equals_single_steps(variant: str, rng: np.random.Generator) -> None:
    bed = Bed(rng, **VARIANTS[variant])
    histories = [rng.integers(0, 61, n).tolist() for n in (7, 1, 12)]
    news = [rng.integers(0, 61, n).tolist() for n in (1, 5, 2)]
    together = [bed.filled(h) for h in histories]
    results = bed.session.step([Work(s, n, "all") for s, n in zip(together, news, strict=True)])
    for history, new, result in zip(histories, news, results, strict=True):
        alone = bed.session.step([Work(bed.filled(history), new, "all")])[0]
        np.testing.assert_allclose(result, alone, rtol=1e-5, atol=1e-5)
        compare_rows(result, bed.oracle.logits(history + new)[len(history) :], 1e-5, "ragged")
    assert [s.length for s in together] == [8, 6, 14]


def test_graph_gets_the_inputs_that_the_architecture_names(bed: Bed, rng: np.random.Generator) -> None:
    a, b = bed.filled([1, 2, 3]), bed.session.new_state()
    bed.session.step([Work(a, [4], "last"), Work(b, [5, 6], "all"), Work(bed.filled([9]), [7, 8], "none")])
    inputs = bed.calls[-1]
    assert set(inputs) == set(bed.graph.input_names)
    assert inputs["input_ids"].tolist() == [4, 5, 6, 7, 8]
    assert inputs["positions"].tolist() == [3, 0, 1, 1, 2]
    assert inputs["sequences"].tolist() == [0, 1, 1, 2, 2]
    assert inputs["past_positions"].tolist() == [0, 1, 2, 0]
    assert inputs["past_sequences"].tolist() == [0, 0, 0, 2]
    assert inputs["logit_rows"].tolist() == [0, 1, 2]
    assert all(x.dtype == np.int64 for n, x in inputs.items() if not n.startswith("past_key") and "value" not in n)


def test_forks_share_memory_and_never_writes(bed: Bed) -> None:
    history = [3, 1, 4, 1, 5]
    parent = bed.filled(history)
    child, prefix, empty = parent.fork(5), parent.fork(2), parent.fork(0)
    assert child.nbytes == prefix.nbytes == empty.nbytes == 0, "shared tokens are the parent's"
    bed.expect(child, history, [9, 2])
    bed.expect(parent, history, [6])
    bed.expect(prefix, history[:2], [6, 5])
    bed.expect(empty, [], [3, 5])
    assert [s.length for s in (parent, child, prefix, empty)] == [6, 7, 4, 2]
    assert child.nbytes == parent.nbytes // 6 * 7
    parent.free()
    bed.expect(child, [*history, 9, 2], [8])


def test_truncated_states_go_on_and_give_memory_back(bed: Bed) -> None:
    history = [2, 7, 1, 8, 2, 8]
    state = bed.filled(history)
    held = state.nbytes
    child = state.fork(6)
    state.truncate(2)
    assert state.nbytes == held // 3
    assert all(part.base is None for part in state.cache)  # type: ignore[attr-defined]
    bed.expect(state, history[:2], [5, 5])
    bed.expect(child, history, [4])
    state.truncate(0)
    assert (state.length, state.nbytes) == (0, 0)
    bed.expect(state, [], [1, 2])


@pytest.mark.parametrize("length", [7, 100, -1])
def test_lengths_beyond_the_state_are_refused_and_change_nothing(length: int, bed: Bed) -> None:
    state = bed.filled([1, 2, 3, 4, 5, 6])
    with pytest.raises(ValueError, match=f"cannot fork at {length}"):
        state.fork(length)
    with pytest.raises(ValueError, match=f"cannot truncate at {length}"):
        state.truncate(length)
    bed.expect(state, [1, 2, 3, 4, 5, 6], [7])


def test_freed_states_raise_wherever_they_are_used(bed: Bed) -> None:
    state, other = bed.filled([1, 2, 3]), bed.filled([4])
    state.free()
    state.free()
    assert (state.length, state.nbytes) == (0, 0)
    for use in (lambda: state.fork(0), lambda: state.fork(2), lambda: state.truncate(0)):
        with pytest.raises(RuntimeError, match="freed"):
            use()
    calls = len(bed.calls)
    with pytest.raises(RuntimeError, match="freed"):
        bed.session.step([Work(other, [5]), Work(state, [5])])
    assert len(bed.calls) == calls, "the graph ran for nothing"
    bed.expect(other, [4], [6])


def test_states_of_another_session_are_refused(bed: Bed, rng: np.random.Generator) -> None:
    class Stranger:
        length, nbytes = 0, 0

    with pytest.raises(ValueError, match="another session"):
        bed.session.step([Work(Stranger(), [1])])  # type: ignore[arg-type]


def _raise(outputs: dict[str, Any]) -> Mapping[str, Any]:
    raise OSError("the engine died")


def _no_logits(outputs: dict[str, Any]) -> Mapping[str, Any]:
    return {k: v for k, v in outputs.items() if k != "logits"}


def _few_logits(outputs: dict[str, Any]) -> Mapping[str, Any]:
    return outputs | {"logits": outputs["logits"][:-1]}


def _no_last_layer(outputs: dict[str, Any]) -> Mapping[str, Any]:
    return {k: v for k, v in outputs.items() if k != "present_value.1"}


def _short_cache(outputs: dict[str, Any]) -> Mapping[str, Any]:
    return outputs | {"present_value.1": outputs["present_value.1"][:-1]}


@pytest.mark.parametrize("failure", [_raise, _no_logits, _few_logits, _no_last_layer, _short_cache])
def test_step_that_fails_changes_nothing(failure: Callable[..., Any], bed: Bed) -> None:
    a, b = bed.filled([1, 2, 3]), bed.filled([4, 5])
    before = [(s.length, [part.copy() for part in s.cache]) for s in (a, b)]  # type: ignore[attr-defined]
    bed.spoil = failure
    with pytest.raises((OSError, KeyError, RuntimeError)):
        bed.session.step([Work(a, [6, 7], "all"), Work(b, [8], "last")])
    bed.spoil = None
    for state, (length, cache) in zip((a, b), before, strict=True):
        assert state.length == length
        for part, kept in zip(state.cache, cache, strict=True):  # type: ignore[attr-defined]
            np.testing.assert_array_equal(part, kept)
    bed.expect(a, [1, 2, 3], [6])
    bed.expect(b, [4, 5], [8])


def _works(bed: Bed, state: State) -> dict[str, tuple[list[Work], str]]:
    new = bed.session.new_state
    return {
        "too many sequences": ([Work(new(), [1]) for _ in range(5)], "5 sequences in one step; this session takes 4"),
        "too many tokens": ([Work(new(), [1] * 40), Work(new(), [1] * 25)], "65 tokens in one step"),
        "beyond the context": ([Work(new(), [1]), Work(state, [1] * 40)], r"60 \+ 40 tokens exceed the context of 96"),
        "one state twice": ([Work(state, [1]), Work(state, [2])], "appears twice"),
        "no tokens": ([Work(new(), [1]), Work(state, [])], "no new tokens"),
        "token too large": ([Work(state, [1, 61])], "token id 61 is outside the vocabulary of 61"),
        "token negative": ([Work(state, [-1, 1])], "token id -1"),
        "top_k too large": ([Work(state, [1], "last", 62)], "top_k 62"),
        "top_k negative": ([Work(state, [1], "last", -1)], "top_k -1"),
    }


@pytest.mark.parametrize("case", [
    "too many sequences", "too many tokens", "beyond the context", "one state twice", "no tokens", "token too large",
    "token negative", "top_k too large", "top_k negative",
])  # fmt: skip
def test_step_beyond_the_limits_is_refused_before_it_runs(case: str, bed: Bed) -> None:
    state = bed.filled([1] * 60)
    calls = len(bed.calls)
    work, message = _works(bed, state)[case]
    with pytest.raises(ValueError, match=message):
        bed.session.step(work)
    assert len(bed.calls) == calls
    assert state.length == 60


def test_static_shape_classes_are_respected(rng: np.random.Generator) -> None:
    bed = Bed(rng, Limits(2, 64, 96, 0, token_classes=(1, 8)))
    with pytest.raises(ValueError, match=r"3 new tokens; this session takes \(1, 8\)"):
        bed.session.step([Work(bed.session.new_state(), [1, 2, 3])])
    bed.expect(bed.session.new_state(), [], list(range(8)))


def test_top_k_is_best_first_and_ties_go_by_id(bed: Bed, rng: np.random.Generator) -> None:
    tokens = rng.integers(0, 61, 6).tolist()
    logits = bed.oracle.logits(tokens)
    ids, values = bed.session.step([Work(bed.session.new_state(), tokens, "all", 5)])[0]  # type: ignore[misc]
    assert (ids.dtype, values.dtype, ids.shape) == (np.int64, np.float32, (6, 5))
    np.testing.assert_array_equal(ids, np.argsort(-logits, -1)[:, :5])
    np.testing.assert_allclose(values, np.sort(logits, -1)[:, ::-1][:, :5], rtol=1e-5, atol=1e-6)
    ids, values = best(np.float32([1, 3, 3, 2, 3]), 4)
    assert ids.tolist() == [1, 2, 4, 3]
    assert values.tolist() == [3, 3, 3, 2]


def test_logits_come_as_asked_and_belong_to_the_caller(bed: Bed) -> None:
    states = [bed.session.new_state() for _ in range(3)]
    kept: list[Any] = []
    bed.spoil = lambda outputs: kept.append(outputs["logits"]) or outputs  # type: ignore[func-returns-value]
    none, last, every = bed.session.step(
        [Work(states[0], [1, 2], "none"), Work(states[1], [3, 4], "last"), Work(states[2], [5, 6], "all")]
    )
    assert none is None
    assert last.shape == (61,)  # type: ignore[union-attr]
    assert every.shape == (2, 61)  # type: ignore[union-attr]
    for array in (last, every):
        assert not np.shares_memory(array, kept[0]), "the engine may write to its own buffer again"
    copies = [np.array(last), np.array(every)]
    kept[0][...] = 0
    bed.session.step([Work(s, [7], "all") for s in states])
    for array, copy in zip((last, every), copies, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_empty_step_does_nothing(bed: Bed) -> None:
    assert list(bed.session.step([])) == []
    assert not bed.calls


def test_closed_session_says_so_and_closes_once(bed: Bed) -> None:
    bed.session.close()
    bed.session.close()
    assert bed.closed == 1
    for use in (bed.session.new_state, lambda: bed.session.step([]), lambda: bed.session.run({})):
        with pytest.raises(RuntimeError, match="closed"):
            use()


def test_graph_without_a_cache_only_runs() -> None:
    session = PackedSession(lambda inputs: {"y": inputs["x"]}, None, LIMITS)
    assert session.run({"x": 3})["y"] == 3
    with pytest.raises(RuntimeError, match="no cache"):
        session.new_state()
