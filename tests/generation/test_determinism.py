"""What a request gives follows from the request alone in a deterministic engine, whatever runs beside it.

The session of these tests computes logits that depend on how the tokens before were divided among steps, and on what
shared those steps, as the rounding of real engines does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from engine_drive import read, request, settled
from fakes import FakeSession, FakeState, next_hash, row_of

from transom.contract import Limits, Work
from transom.errors import OptionError
from transom.generation.engine import Engine
from transom.generation.params import SamplingParams
from transom.generation.requests import Request

CHUNK = 16
PROMPTS = [[3], [5, 6, 7] * 15, list(range(CHUNK)), [9] * 33, [5, 6, 7] * 15]
"""A token; some chunks; exactly one; and a prompt that another request has, too."""


class Remembering(FakeState):
    """Remembers for each token a number that follows from the steps that computed it and the tokens before."""

    values: list[int]

    def fork(self, length: int) -> FakeState:
        other = super().fork(length)
        other.__class__ = Remembering
        other.values = self.values[:length]  # type: ignore[attr-defined]
        return other

    def truncate(self, length: int) -> None:
        super().truncate(length)
        del self.values[length:]


class Rounding(FakeSession):
    """A session whose numbers depend on its steps. `shared` counts those with more than one sequence."""

    shared = 0

    def new_state(self) -> FakeState:
        state = super().new_state()
        state.__class__ = Remembering
        state.values = []  # type: ignore[attr-defined]
        return state

    def step(self, work: Sequence[Work]) -> list[Any]:
        self.shared += len(work) > 1
        self._size = 0 if self.limits.batch_invariant else sum(len(w.tokens) for w in work)
        return super().step(work)

    def _run(self, work: Work) -> Any:
        state: Any = work.state
        chunk = len(work.tokens) if work.sparsity is not None or not self.limits.batch_invariant else 0
        value, rows = state.values[-1] if state.values else 1, []
        value = next_hash(next_hash(value, self._size), chunk) if self._size or chunk else value
        for token in work.tokens:
            value = next_hash(value, token)
            state.values.append(value)
            rows.append(row_of(value, self.vocabulary, self.spread))
        output = super()._run(work)
        if output is None:
            return None
        return rows[-1] if work.logits == "last" else rows


def session(**options: Any) -> Rounding:
    return Rounding(max_tokens=CHUNK, **options)


def invariant(made: Rounding) -> Rounding:
    old = made.limits
    made.limits = Limits(
        old.max_sequences, old.max_tokens, old.context, old.page_tokens, old.token_classes, batch_invariant=True
    )
    return made


def requests(made: FakeSession, **options: Any) -> list[Request]:
    return [
        request(made, prompt, SamplingParams(temperature=1.0, seed=i, n=1 + 2 * (i == 3)), 9 + i, **options)
        for i, prompt in enumerate(PROMPTS)
    ]


def alone(options: dict[str, Any], make: Any = lambda made: made, **asked: Any) -> list[list[list[int]]]:
    """The answers of each request in an engine of its own."""
    answers = []
    for i in range(len(PROMPTS)):
        made = make(session(**{**options, "pages": 10 * options.get("pages", 0)}))
        engine = Engine(made, deterministic=True)
        one = requests(made, **asked)[i]
        engine.submit(one)
        answers.append(read(engine, one))
        settled(made, engine)
    return answers


def together(made: FakeSession, engine: Engine, **asked: Any) -> list[list[list[int]]]:
    every = requests(made, **asked)
    for one in every:
        engine.submit(one)
    return [read(engine, one) for one in every]


KINDS: dict[str, dict[str, Any]] = {
    "contiguous": {},
    "one sequence in a step": {"max_sequences": 1},
    "static shapes": {"token_classes": (1, 4, CHUNK)},
    "pages": {"page_tokens": 4, "pages": 400},
    "few pages": {"page_tokens": 4, "pages": 22},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_deterministic_engine_gives_each_request_what_it_gives_it_alone(kind: str) -> None:
    made = session(**KINDS[kind])
    engine = Engine(made, deterministic=True)
    assert together(made, engine) == alone(KINDS[kind])
    assert made.shared == 0
    assert (engine.preemptions > 0) == (kind == "few pages")
    assert together(made, engine) == alone(KINDS[kind]), "what is kept of earlier requests changes an answer"
    settled(made, engine)


def test_without_it_the_same_requests_share_steps_and_give_something_else() -> None:
    made = session()
    engine = Engine(made)
    assert together(made, engine) != alone({})
    assert made.shared > 0
    settled(made, engine)


def test_a_batch_invariant_session_goes_on_sharing_steps() -> None:
    made = invariant(session())
    engine = Engine(made, deterministic=True)
    assert together(made, engine) == alone({}, invariant)
    assert made.shared > 0
    settled(made, engine)


def test_a_policy_that_selects_keys_needs_steps_of_its_own_there_too() -> None:
    options, sparse = {"page_tokens": 4, "pages": 22}, {"sparsity": "some", "selects_keys": True}
    made = invariant(session(**options))
    engine = Engine(made, deterministic=True)
    expected = alone(options, invariant, **sparse)
    assert together(made, engine, **sparse) == expected
    assert engine.preemptions > 0
    assert together(made, engine, **sparse) == expected
    assert made.shared == 0
    settled(made, engine)


@pytest.mark.parametrize("kind", ["contiguous", "static shapes"])
def test_a_step_that_ctrl_c_interrupts_is_repeated_as_it_was(kind: str) -> None:
    expected = alone(KINDS[kind])
    for number in range(1, 12):
        made = session(**KINDS[kind])
        engine = Engine(made, deterministic=True)
        left = [number]

        def interrupt(works: Sequence[Work], left: list[int] = left) -> None:
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt

        made.after = interrupt
        every = requests(made)
        for one in every:
            engine.submit(one)
        with pytest.raises(KeyboardInterrupt):
            read(engine, every[0])
        assert [read(engine, one) for one in every[1:]] == expected[1:]
        engine.cancel(every[0])
        settled(made, engine)


def test_logits_do_not_depend_on_what_runs_beside_them() -> None:
    found = []
    for others in (False, True):
        made = session()
        engine = Engine(made, deterministic=True)
        if others:
            for one in requests(made):
                engine.submit(one)
        asked = Request([7] * 41, ())
        engine.submit(asked)
        while engine.next_event(asked) is not None:
            pass
        assert asked.logits is not None
        found.append(asked.logits.tobytes())
        engine.close()
    assert found[0] == found[1]


def test_prompt_caches_are_refused_where_they_would_change_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeSession, "save", lambda self, state: {}, raising=False)
    monkeypatch.setattr(FakeSession, "restore", lambda self, length, arrays: self.new_state(), raising=False)
    for made, saves in ((session(page_tokens=4, pages=9), False), (invariant(session(page_tokens=4, pages=9)), True)):
        engine = Engine(made, deterministic=True)
        assert engine.saves is saves
        assert Engine(made).saves
        if not saves:
            with pytest.raises(OptionError, match="reads every prompt anew"):
                engine.save_latest()
            with pytest.raises(OptionError, match="reads every prompt anew"):
                engine.restore([1], None, {})


def test_the_chunks_of_a_prompt_are_those_of_its_positions() -> None:
    made = session(page_tokens=4, pages=400)
    engine = Engine(made, deterministic=True)
    asked = request(made, [1] * 41, SamplingParams(), 3)
    engine.submit(asked)
    read(engine, asked)
    assert [step[0][0] for step in made.steps] == [CHUNK] * math.floor(41 / CHUNK) + [41 % CHUNK] + [1, 1]
