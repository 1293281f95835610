"""Caches of ended sequences: which are reused, which are not, and that no answer changes.

Draws: what is compared must be equal, whatever the numbers are.
"""

from __future__ import annotations

from typing import Any

import pytest
from engine_drive import alone, read, request, settled
from fakes import FakeSession
from hypothesis import given, settings
from hypothesis import strategies as st

from transom.contract import OutOfPages
from transom.errors import DoesNotFit, OptionError
from transom.generation.engine import Engine
from transom.generation.params import SamplingParams
from transom.generation.prefixes import MAX_SEQUENCES, MIN_NEW_TOKENS, PrefixCache

GREEDY = SamplingParams(temperature=0.0)


def _steps(session: FakeSession) -> list[int]:
    """Tokens of each step from here on."""
    counts: list[int] = []
    step = session.step

    def watched(works: Any) -> Any:
        counts.extend(len(work.tokens) for work in works)
        return step(works)

    session.step = watched  # type: ignore[method-assign]
    return counts


def _answer(engine: Engine, session: FakeSession, prompt: list[int], **options: Any) -> tuple[list[int], int]:
    """An answer of three tokens, and how many tokens of the prompt were cached."""
    asked = request(session, prompt, GREEDY, 3, **options)
    engine.submit(asked)
    (answer,) = read(engine, asked)
    return answer, asked.cached_tokens


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_answers_are_the_same_whatever_is_kept(data: Any) -> None:
    session = FakeSession(page_tokens=4, pages=40, max_tokens=16)
    engine = Engine(session)
    known: list[list[int]] = [[]]
    for _ in range(data.draw(st.integers(2, 8))):
        start = data.draw(st.sampled_from(known))
        start = start[: data.draw(st.integers(0, len(start)))]
        prompt = start + data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=30))
        answer, cached = _answer(engine, session, prompt[:60])
        assert [answer] == alone(session, prompt[:60], GREEDY, 3)
        assert cached % 4 == 0
        known.append(prompt[:60] + answer)
    settled(session, engine)


def test_a_prompt_is_reused_only_with_the_same_salt() -> None:
    session = FakeSession(page_tokens=4, pages=60)
    engine = Engine(session)
    prompt = list(range(24))
    first, _ = _answer(engine, session, prompt, salt="one tenant")
    for salt, expected in (("one tenant", 16), ("another", 0), ("another", 16), ("", 0), ("", 16)):
        answer, cached = _answer(engine, session, prompt, salt=salt)
        assert (answer, cached) == (first, expected), salt
    settled(session, engine)


def test_only_what_is_new_is_read() -> None:
    session = FakeSession(page_tokens=4, pages=40)
    engine = Engine(session)
    prompt = list(range(30))
    answer, cached = _answer(engine, session, prompt)
    assert cached == 0
    counts = _steps(session)
    following = prompt + answer + list(range(40, 55))  # the next turn of a conversation: 48 tokens
    again, cached = _answer(engine, session, following)
    assert cached == 32  # of 30 + 2 computed ones, whole pages
    assert counts == [16, 1, 1]
    assert [again] == alone(session, following, GREEDY, 3)


def test_some_tokens_are_read_in_any_case() -> None:
    session = FakeSession(page_tokens=4, pages=40)
    engine = Engine(session)
    prompt = list(range(32))
    _answer(engine, session, prompt)
    _, cached = _answer(engine, session, prompt)
    assert cached == (len(prompt) - MIN_NEW_TOKENS) // 4 * 4


def test_a_policy_shares_with_its_own_and_at_whole_chunks() -> None:
    session = FakeSession(page_tokens=4, pages=6400, max_tokens=64, context=51200)
    engine = Engine(session)
    prompt = [i % 61 for i in range(250)]
    _answer(engine, session, prompt, sparsity="a", selects_keys=True)
    assert _answer(engine, session, prompt, sparsity="b", selects_keys=True)[1] == 0
    assert _answer(engine, session, prompt)[1] == 0
    assert _answer(engine, session, prompt, sparsity="a", selects_keys=True)[1] == 192  # chunks of 64
    assert _answer(engine, session, prompt)[1] == 240  # pages of 4


def test_what_is_kept_gives_way_to_what_runs() -> None:
    session = FakeSession(page_tokens=4, pages=12)  # 48 tokens in all
    engine = Engine(session)
    _answer(engine, session, list(range(20)))
    assert engine.kept == 1
    other = list(range(59, 19, -1))
    answer, cached = _answer(engine, session, other)  # 43 tokens: needs the pages of the first
    assert cached == 0
    assert [answer] == alone(session, other, GREEDY, 3)
    assert engine.preemptions == 0
    settled(session, engine)


def test_an_unrelated_prompt_leaves_little_of_what_is_kept() -> None:
    session = FakeSession(page_tokens=4, pages=4000, context=3200)  # of which 100 may stay
    engine = Engine(session)
    for start in (0, 20, 40):
        _answer(engine, session, [(start + i) % 61 for i in range(90)])
    assert engine.kept == 2  # the last one, and the one before it
    settled(session, engine)


def test_a_last_step_has_as_few_tokens_as_it_would_have_had() -> None:
    kept = PrefixCache(4, 64, 1000)
    assert kept._usable(150, 200, selects_keys=False) == 148
    assert kept._usable(150, 195, selects_keys=False) == 128  # without reuse, its last step has three tokens
    assert kept._usable(150, 218, selects_keys=False) == 144  # 218 - 148 would leave a last step of six
    assert kept._usable(150, 200, selects_keys=True) == 128
    assert kept._usable(200, 200, selects_keys=False) == 192
    assert kept._usable(192, 192, selects_keys=True) == 128
    assert kept._usable(3, 200, selects_keys=False) == 0


def test_not_more_than_some_are_kept() -> None:
    session = FakeSession(page_tokens=4, pages=6400, context=51200)
    engine = Engine(session)
    for i in range(MAX_SEQUENCES + 3):
        _answer(engine, session, [i] * 12)
    assert engine.kept == MAX_SEQUENCES
    settled(session, engine)


def test_without_a_pool_nothing_is_kept() -> None:
    session = FakeSession()
    engine = Engine(session)
    _answer(engine, session, list(range(30)))
    assert engine.kept == 0


def test_closing_frees_what_is_kept() -> None:
    session = FakeSession(page_tokens=4, pages=40)
    engine = Engine(session)
    _answer(engine, session, list(range(30)))
    engine.close()
    assert session.live == set()
    assert session.violations == []


class SavingFake(FakeSession):
    """Raises a given error when a state is restored."""

    problem: Exception

    def save(self, state: Any) -> dict[str, Any]:
        return {}

    def restore(self, length: int, arrays: Any) -> Any:
        raise self.problem


@pytest.mark.parametrize(
    ("problem", "error", "said"),
    [
        (OutOfPages("none"), DoesNotFit, "has 30 tokens"),
        (ValueError("no pages"), OptionError, "does not fit this model"),
    ],
)
def test_a_saved_prompt_that_cannot_be_restored(problem: Exception, error: type[Exception], said: str) -> None:
    session = SavingFake(page_tokens=4, pages=40)
    session.problem = problem
    engine = Engine(session)
    with pytest.raises(error, match=said):
        engine.restore(list(range(30)), None, {})
    assert engine.kept == 0
    settled(session, engine)
