"""The engine: concurrent generations give the same results as each one alone, also when others fail.

Draws: what is compared must be equal, whatever the numbers are.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from engine_drive import alone, read, request, settled
from fakes import FakeSession, logits_after
from hypothesis import given, settings
from hypothesis import strategies as st

from transom.contract import OutOfPages, Work
from transom.errors import DoesNotFit, EngineError
from transom.generation.engine import Engine
from transom.generation.params import SamplingParams
from transom.generation.requests import PrefillEvent, Request, TokenEvent
from transom.generation.scheduling import FairPolicy, StepSlice, fit

shapes = st.one_of(
    st.fixed_dictionaries({"max_sequences": st.integers(1, 6), "max_tokens": st.integers(6, 40)}),
    st.fixed_dictionaries(
        {
            "max_sequences": st.integers(1, 6),
            "max_tokens": st.just(40),
            "token_classes": st.sampled_from([(1,), (1, 8), (4,), (2, 16), (1, 4, 32), (8, 32)]),
        }
    ),
    st.fixed_dictionaries(
        {
            "max_sequences": st.integers(1, 6),
            "max_tokens": st.integers(6, 40),
            "page_tokens": st.sampled_from([1, 4, 16]),
            "pages": st.just(0),
        }
    ),
)
sampling = st.sampled_from(
    [{}, {"temperature": 1.0}, {"temperature": 0.8, "top_k": 5}, {"temperature": 1.2, "top_p": 0.8, "n": 3}]
)
prompts = st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=30), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(shapes, prompts, st.data())
def test_every_answer_of_a_batch_is_the_one_it_would_be_alone(shape: dict[str, Any], texts: Any, data: Any) -> None:
    count = data.draw(st.integers(1, 12))
    if "pages" in shape:
        # From just enough for one to enough for all: preemption at every degree.
        one = -(-(max(map(len, texts)) + count) // shape["page_tokens"])
        shape = {**shape, "pages": data.draw(st.integers(one + 1, one * len(texts) * 3 + 1))}
    session = FakeSession(**shape)
    engine = Engine(session)
    chosen = [SamplingParams(seed=i, **data.draw(sampling)) for i in range(len(texts))]
    asked = [request(session, text, params, count) for text, params in zip(texts, chosen, strict=True)]
    for one_request in asked:
        engine.submit(one_request)
    for i in data.draw(st.permutations(range(len(texts)))):
        assert read(engine, asked[i]) == alone(session, texts[i], chosen[i], count)
    settled(session, engine)
    assert engine.requests == 0
    engine.close()
    assert session.closed == 1


@settings(max_examples=40, deadline=None)
@given(shapes, prompts, st.data())
def test_cancelling_at_any_moment_leaves_the_others_right_and_nothing_behind(
    shape: dict[str, Any], texts: Any, data: Any
) -> None:
    if "pages" in shape:
        one = -(-(max(map(len, texts)) + 10) // shape["page_tokens"])
        shape = {**shape, "pages": one * 2 + 1}
    session = FakeSession(**shape)
    engine = Engine(session)
    params = [SamplingParams(seed=i, **data.draw(sampling)) for i in range(len(texts))]
    asked = [request(session, text, p, 10) for text, p in zip(texts, params, strict=True)]
    victims = data.draw(st.sets(st.sampled_from(range(len(texts)))))
    deadline = {i: data.draw(st.integers(0, 12)) for i in victims}

    def before(works: Sequence[Work]) -> None:
        for i in victims:
            deadline[i] -= 1
            if deadline[i] < 0:
                asked[i].cancelled = True

    session.before = before
    for one_request in asked:
        engine.submit(one_request)
    for i, one_request in enumerate(asked):
        got = read(engine, one_request)
        expected = alone(session, texts[i], params[i], 10)
        if i in victims:
            assert all(short == whole[: len(short)] for short, whole in zip(got, expected, strict=True))
        else:
            assert got == expected
    settled(session, engine)


def test_threads_share_steps_and_each_gets_its_own_answer() -> None:
    session = FakeSession(max_sequences=8, step_seconds=0.002)
    engine = Engine(session)
    params = [SamplingParams(seed=i, temperature=1.0) for i in range(6)]
    results: dict[int, list[list[int]]] = {}

    def work(i: int) -> None:
        asked = request(session, [i, i + 1, i + 2], params[i], 25)
        engine.submit(asked)
        results[i] = read(engine, asked)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == {i: alone(session, [i, i + 1, i + 2], params[i], 25) for i in range(6)}
    settled(session, engine)
    assert len(session.steps) < 6 * 25 / 2
    assert max(len(step) for step in session.steps) > 3


def test_threads_that_come_go_and_cancel_at_random_stay_right(rng: np.random.Generator) -> None:
    session = FakeSession(max_sequences=3, max_tokens=16, page_tokens=4, pages=24, step_seconds=0.0003)
    engine = Engine(session)
    failures: list[str] = []

    def work(seed: int) -> None:
        own = np.random.default_rng(seed)
        for turn in range(6):
            prompt = own.integers(0, 60, own.integers(1, 20)).tolist()
            params = SamplingParams(seed=turn, temperature=1.0, n=int(own.integers(1, 3)))
            asked = request(session, prompt, params, 12)
            engine.submit(asked)
            stop_after = int(own.integers(1, 20))
            got: list[list[int]] = [[] for _ in asked.branches]
            while (event := engine.next_event(asked)) is not None:
                assert isinstance(event, TokenEvent)
                got[event.branch].append(event.id)
                stop_after -= 1
                if stop_after == 0:
                    engine.cancel(asked)
            expected = alone(session, prompt, params, 12)
            if any(a != b[: len(a)] for a, b in zip(got, expected, strict=True)) or (
                stop_after > 0 and got != expected
            ):
                failures.append(f"thread {seed}, turn {turn}: {got} != {expected}")

    threads = [threading.Thread(target=work, args=(int(s),)) for s in rng.integers(0, 2**31, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a thread hangs"
    assert failures == []
    settled(session, engine)


def test_a_single_generation_needs_no_other_thread() -> None:
    session = FakeSession()
    engine = Engine(session)
    before = threading.active_count()
    asked = request(session, [1, 2, 3], SamplingParams(), 5)
    engine.submit(asked)
    read(engine, asked)
    assert threading.active_count() == before
    assert [len(step) for step in session.steps] == [1] * 5


def test_a_session_for_one_sequence_serves_several_in_turn() -> None:
    session = FakeSession(max_sequences=1)
    engine = Engine(session)
    asked = [request(session, [i], SamplingParams(), 6) for i in range(3)]
    for one in asked:
        engine.submit(one)
    for turn in range(1, 6):
        engine.next_event(asked[2])
        assert [len(one.events) for one in asked] == [turn, turn, 0]
    assert all(len(step) == 1 for step in session.steps)


def test_a_prompt_is_read_in_chunks_with_progress() -> None:
    session = FakeSession(max_tokens=64)
    engine = Engine(session, FairPolicy(chunk=10))
    asked = request(session, list(range(35)), SamplingParams(), 1, progress=True)
    engine.submit(asked)
    events = []
    while (event := engine.next_event(asked)) is not None:
        events.append(event)
    assert events[:-1] == [PrefillEvent(10, 35), PrefillEvent(20, 35), PrefillEvent(30, 35), PrefillEvent(35, 35)]
    assert session.steps == [[(10, "none")]] * 3 + [[(5, "last")]]


def test_running_answers_do_not_wait_for_a_long_prompt() -> None:
    session = FakeSession(max_tokens=512)
    engine = Engine(session, FairPolicy(chunk=100, mixed_chunk=20))
    first = request(session, [1], SamplingParams(), 8)
    engine.submit(first)
    engine.next_event(first)
    engine.submit(request(session, [2] * 100, SamplingParams(), 1))
    read(engine, first)
    assert session.steps[1:6] == [[(1, "last"), (20, "none")]] * 4 + [[(1, "last"), (20, "last")]]


def test_answers_to_one_prompt_share_its_cache() -> None:
    session = FakeSession()
    engine = Engine(session)
    params = SamplingParams(temperature=1.0, seed=3, n=4)
    asked = request(session, list(range(20)), params, 5)
    engine.submit(asked)
    assert read(engine, asked) == alone(session, list(range(20)), params, 5)
    assert session.forks == 3
    assert sum(tokens for step in session.steps for tokens, _ in step) == 20 + 4 * 4
    settled(session, engine)


def test_answers_of_one_token_share_the_prompt_too() -> None:
    session = FakeSession()
    engine = Engine(session)
    asked = request(session, list(range(20)), SamplingParams(temperature=1.0, n=4), 1)
    engine.submit(asked)
    assert [len(answer) for answer in read(engine, asked)] == [1] * 4
    assert session.steps == [[(20, "last")]]
    settled(session, engine)


def test_a_full_pool_makes_the_least_computed_wait_and_all_finish() -> None:
    session = FakeSession(page_tokens=4, pages=14, max_sequences=8)
    engine = Engine(session, FairPolicy(spare=0.0))
    asked = [request(session, [i] * 10, SamplingParams(), 20) for i in range(4)]
    for one in asked:
        engine.submit(one)
    for i, one in enumerate(asked):
        assert read(engine, one) == alone(session, [i] * 10, SamplingParams(), 20)
    assert engine.preemptions > 0
    settled(session, engine)


def test_a_pool_without_pages_that_fills_up_makes_others_wait_too() -> None:
    session = FakeSession(max_sequences=4)

    def before(works: Sequence[Work]) -> None:
        if sum(len(state.tokens) for state in session.live) + sum(len(w.tokens) for w in works) > 65:
            raise OutOfPages

    session.before = before
    engine = Engine(session)
    asked = [request(session, [i] * 10, SamplingParams(), 20) for i in range(6)]
    for one in asked:
        engine.submit(one)
    for i, one in enumerate(asked):
        assert read(engine, one) == alone(session, [i] * 10, SamplingParams(), 20)
    settled(session, engine)
    assert len(session.steps) < 50  # a preempted one resumes as soon as another has ended


def test_a_sequence_that_does_not_fit_alone_says_so_and_others_go_on() -> None:
    session = FakeSession(page_tokens=4, pages=8, max_sequences=4)
    engine = Engine(session)
    large = request(session, [1] * 40, SamplingParams(), 20)
    small = request(session, [2] * 4, SamplingParams(), 4)
    engine.submit(large)
    engine.submit(small)
    with pytest.raises(DoesNotFit, match=r"40 tokens does not fit .* 8 pages of 4 tokens"):
        read(engine, large)
    assert read(engine, small) == alone(session, [2] * 4, SamplingParams(), 4)
    settled(session, engine)


def test_a_fork_without_room_reads_the_prompt_by_itself() -> None:
    session = FakeSession(page_tokens=4, pages=9)
    engine = Engine(session)
    params = SamplingParams(temperature=1.0, seed=1, n=3)
    asked = request(session, [7] * 9, params, 10)
    engine.submit(asked)
    assert read(engine, asked) == alone(session, [7] * 9, params, 10)
    settled(session, engine)


def test_a_forgotten_reader_gives_way_to_one_who_waits() -> None:
    session = FakeSession(page_tokens=4, pages=10)
    engine = Engine(session)
    forgotten = request(session, [1] * 8, SamplingParams(), 24, read_ahead=2)
    engine.submit(forgotten)
    engine.next_event(forgotten)
    other = request(session, [2] * 30, SamplingParams(), 6)
    engine.submit(other)
    assert read(engine, other) == alone(session, [2] * 30, SamplingParams(), 6)
    assert len(forgotten.events) <= 2
    rest = read(engine, forgotten)[0]
    assert rest == alone(session, [1] * 8, SamplingParams(), 24)[0][1:]
    settled(session, engine)


def test_a_step_that_fails_ends_only_the_sequence_it_fails_for() -> None:
    session = FakeSession(max_sequences=4)

    def before(works: Sequence[Work]) -> None:
        if any(work.tokens[0] == 9 and work.state.length == 0 for work in works):
            raise RuntimeError("kernel 7 said no")

    session.before = before
    engine = Engine(session)
    good = [request(session, [i, i], SamplingParams(), 6) for i in range(3)]
    bad = request(session, [9, 9], SamplingParams(), 6)
    for one in (*good[:2], bad, good[2]):
        engine.submit(one)
    for i, one in enumerate(good):
        assert read(engine, one) == alone(session, [i, i], SamplingParams(), 6)
    with pytest.raises(EngineError, match="kernel 7 said no") as caught:
        read(engine, bad)
    assert isinstance(caught.value.__cause__, RuntimeError)
    settled(session, engine)


def test_nan_logits_end_only_the_sequence_they_are_in() -> None:
    session = FakeSession()
    inner = session._run

    def run(work: Work) -> Any:
        output = inner(Work(work.state, work.tokens, work.logits))
        if work.state.tokens[0] == 9 and output is not None:  # type: ignore[attr-defined]
            output[3] = np.nan
        return output

    session._run = run  # type: ignore[method-assign]
    engine = Engine(session)
    good, bad = request(session, [1], SamplingParams(), 4), request(session, [9], SamplingParams(), 4)
    engine.submit(good)
    engine.submit(bad)
    assert read(engine, good) == alone(session, [1], SamplingParams(), 4)
    with pytest.raises(Exception, match="not a number"):
        read(engine, bad)
    settled(session, engine)


def test_the_whole_session_can_be_had_between_two_steps() -> None:
    session = FakeSession(step_seconds=0.001, context=5000)
    engine = Engine(session)
    asked = request(session, [1], SamplingParams(), 200)
    engine.submit(asked)
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(read(engine, asked)))
    thread.start()
    for _ in range(10):
        with engine.exclusive() as owned:
            assert owned.run({"x": np.ones(3)})["sum"] == 3
    thread.join(60)
    assert answers == [alone(session, [1], SamplingParams(), 200)]
    settled(session, engine)


@settings(max_examples=40, deadline=None)
@given(shapes, st.lists(st.integers(0, 60), min_size=1, max_size=50), st.data())
def test_logits_of_all_tokens_are_those_of_each_prefix(shape: dict[str, Any], tokens: Any, data: Any) -> None:
    if "pages" in shape:
        shape = {**shape, "pages": 60}
    session = FakeSession(**shape)
    engine = Engine(session)
    others = [request(session, [i], SamplingParams(), 9) for i in range(data.draw(st.integers(0, 2)))]
    for one in others:
        engine.submit(one)
    asked = Request(tokens, ())
    engine.submit(asked)
    assert engine.next_event(asked) is None
    expected = np.stack([logits_after(tokens[: i + 1], session.vocabulary) for i in range(len(tokens))])
    np.testing.assert_array_equal(asked.logits, expected)
    for i, one in enumerate(others):
        assert read(engine, one) == alone(session, [i], SamplingParams(), 9)
    settled(session, engine)


@given(
    st.integers(1, 3000),
    st.integers(1, 2048),
    st.sampled_from([(1,), (1, 64), (64,), (1, 16, 256), (8, 512), (32, 128, 1024)]),
)
def test_a_static_shape_is_filled_or_holds_all_that_is_left(pending: int, room: int, classes: tuple[int, ...]) -> None:
    fitted = fit(pending, room, 4096, classes)
    if fitted is None:
        assert room < min(classes)
        return
    take, width = fitted
    assert width in classes
    assert width <= room
    assert 1 <= take <= min(width, pending)
    assert take in (width, pending)


def test_padding_never_reaches_beyond_the_context() -> None:
    session = FakeSession(context=40, token_classes=(4, 16), max_tokens=32)
    engine = Engine(session)
    assert engine.context == 37
    asked = request(session, [3] * 30, SamplingParams(), 7)
    engine.submit(asked)
    assert read(engine, asked) == alone(session, [3] * 30, SamplingParams(), 7)
    settled(session, engine)


def test_a_reader_who_does_not_keep_up_gives_way_before_the_least_computed() -> None:
    session = FakeSession()
    engine = Engine(session)
    oldest, slow, young = (request(session, [1] * length, SamplingParams(), 5, read_ahead=1) for length in (9, 20, 9))
    for one in (oldest, slow, young):
        engine.submit(one)
    assert engine.next_event(oldest) is not None
    assert engine.next_event(young) is not None
    assert engine.next_event(oldest) is not None
    branches = [one.branches[0] for one in (oldest, slow, young)]
    assert [branch.runnable for branch in branches] == [True, False, False]
    engine.next_event(young)
    plan = FairPolicy().plan(branches, session.limits, session.pages)
    assert FairPolicy().victim(branches, plan) is slow.branches[0]
    assert FairPolicy().victim(branches[:1], plan[:1]) is None


def test_another_policy_can_take_the_place_of_the_default() -> None:
    class OneToken:
        """Reads prompts one token at a time, one sequence after the other."""

        def plan(self, branches: Any, limits: Any, pages: Any) -> list[StepSlice]:
            return [StepSlice(next(b for b in branches if b.runnable), 1, 1)]

        def victim(self, branches: Any, plan: Any) -> None:
            return None

    session = FakeSession()
    engine = Engine(session, OneToken())
    asked = request(session, [1, 2, 3], SamplingParams(), 3)
    engine.submit(asked)
    assert read(engine, asked) == alone(session, [1, 2, 3], SamplingParams(), 3)
    assert session.steps[:3] == [[(1, "none")], [(1, "none")], [(1, "last")]]


def test_nothing_keeps_a_finished_request_alive() -> None:
    session = FakeSession()
    engine = Engine(session)
    asked = request(session, [1], SamplingParams(), 2)
    engine.submit(asked)
    read(engine, asked)
    assert engine.requests == 0
    del asked
    gc.collect()
    assert not [o for o in gc.get_objects() if isinstance(o, Request)]
