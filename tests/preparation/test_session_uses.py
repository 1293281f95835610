"""The self-check asks a session for what generation asks for: it refuses one that is wrong in a single use, and names
that use; and it takes three steps more than the plain prompt.

Draws: the sessions compute in float32 what the reference computes, about 1e-6 from it, or something else on purpose.
The smallest of these errors, a few foreign keys among those of the prompt, is 0.08 of a row's spread with six layers,
and 0.05 is allowed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import wrong_sessions

from transom.contract import Limits, OutOfPages, Work
from transom.errors import EngineError, SelfCheckFailed
from transom.preparation import selfcheck
from transom.preparation.compiled import APPROXIMATE, EXACT, Allowed
from transom.preparation.reference_outputs import check_prompt, reference_logits
from transom.reference.executor import Executor
from transom.sessions import PackedSession
from transom.testing.models import tiny_decoder

LIMITS = Limits(max_sequences=8, max_tokens=64, context=64, page_tokens=0)
FORMS = {
    "eight": LIMITS,
    "two": replace(LIMITS, max_sequences=2),
    "one": replace(LIMITS, max_sequences=1),
    "narrow": replace(LIMITS, max_tokens=3),
    "static": replace(LIMITS, token_classes=(1, 4)),
    "static alone": replace(LIMITS, max_sequences=1, token_classes=(8,)),
}


class Bench:
    def __init__(self, rng: np.random.Generator, limits: Limits = LIMITS) -> None:
        self.graph = tiny_decoder(rng, layers=6)
        self.decoder, self.limits = self.graph.decoder, limits
        assert self.decoder is not None
        self.executor = Executor(self.graph, keep_weights=True)
        self.ids = check_prompt(self.decoder, None)
        self.expected = reference_logits(self.graph, self.ids)
        self.widths: list[list[int]] = []

    def check(self, kind: type[PackedSession] = PackedSession, allowed: Allowed = EXACT, ids: Any = None) -> Any:
        session = kind(lambda inputs: self.executor.run(inputs), self.decoder, self.limits)
        step = session.step

        def counted(work: Sequence[Work]) -> Any:
            self.widths.append([len(w.tokens) for w in work])
            return step(work)

        session.step = counted  # type: ignore[method-assign]
        ids = self.ids if ids is None else ids
        return selfcheck.decoder_logits(session, self.expected, ids, allowed=allowed, backend="b")


@pytest.mark.seeds(3300407024, 260817869)
@pytest.mark.parametrize("allowed", [EXACT, APPROXIMATE], ids=["exact", "approximate"])
@pytest.mark.parametrize("kind", wrong_sessions.wrong(), ids=lambda kind: kind.__name__)
def test_a_session_that_is_wrong_in_one_use_is_refused_and_that_use_is_named(
    rng: np.random.Generator, kind: Any, allowed: Allowed
) -> None:
    bench = Bench(rng)
    alone = selfcheck.session_logits(
        kind(lambda inputs: bench.executor.run(inputs), bench.decoder, LIMITS), bench.ids, "b"
    )
    np.testing.assert_allclose(alone, bench.expected, atol=1e-4)  # right in the prompt and its decoded tokens
    with pytest.raises(SelfCheckFailed) as caught:
        bench.check(kind, allowed)
    assert caught.value.cause.startswith("The backend b ")
    assert kind.said in caught.value.cause


@pytest.mark.parametrize("form", FORMS)
def test_a_right_session_passes_within_its_limits(rng: np.random.Generator, form: str) -> None:
    bench = Bench(rng, FORMS[form])
    np.testing.assert_allclose(bench.check(), bench.expected, atol=1e-4)
    np.testing.assert_allclose(bench.check(wrong_sessions.Saving), bench.expected, atol=1e-4)


@pytest.mark.parametrize(
    ("form", "kind"),
    [("one", "WrongLastRow"), ("one", "CutForgetsNothing"), ("one", "RestoresZeros")]
    + [(form, kind) for form in ("one", "static alone") for kind in ("WorstFirst", "SharingFork", "StaleFork")],
)
def test_a_session_that_runs_one_sequence_a_step_is_checked_too(rng: np.random.Generator, kind: str, form: str) -> None:
    wrong = getattr(wrong_sessions, kind)
    with pytest.raises(SelfCheckFailed) as caught:
        Bench(rng, FORMS[form]).check(wrong)
    assert wrong.said in caught.value.cause


@pytest.mark.parametrize("error", [OutOfPages, MemoryError, NotImplementedError])
def test_states_that_cannot_be_forked_are_accepted(
    rng: np.random.Generator, error: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wrong_sessions.WithoutForks.state, "error", error)
    bench = Bench(rng)
    np.testing.assert_allclose(bench.check(wrong_sessions.WithoutForks), bench.expected, atol=1e-4)
    assert max(map(len, bench.widths)) > 1


def test_a_pool_for_one_state_is_accepted(rng: np.random.Generator) -> None:
    class OneState(PackedSession):
        def new_state(self) -> Any:
            if getattr(self, "held", None) is not None and self.held._cache is not None:
                raise OutOfPages("one state only")
            self.held = super().new_state()
            return self.held

    bench = Bench(rng)
    np.testing.assert_allclose(bench.check(OneState), bench.expected, atol=1e-4)


@pytest.mark.parametrize("length", range(1, 17))
def test_prompts_of_every_length_pass(rng: np.random.Generator, length: int) -> None:
    bench = Bench(rng)
    assert len(bench.check(ids=bench.ids[:length])) == length


def test_the_check_takes_three_steps_more_than_the_prompt_alone(rng: np.random.Generator) -> None:
    bench = Bench(rng)
    bench.check()
    assert bench.widths == [[13], [2, 1], [2, 2, 1], [4, 2, 4], [1], [1, 1, 1, 1], [1]]


def test_wrong_logits_of_the_prompt_itself_are_left_to_the_comparison_with_the_reference(
    rng: np.random.Generator,
) -> None:
    class Wrong(PackedSession):
        def step(self, work: Sequence[Work]) -> Any:
            return [r if r is None or isinstance(r, tuple) else -r for r in super().step(work)]

    bench = Bench(rng)
    np.testing.assert_allclose(bench.check(Wrong), -bench.expected, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r, w: r[None] if w.logits == "last" and not w.top_k else r, r"shape \(1, 61\) for logits='last'"),
        (lambda r, w: r[:-1] if w.logits == "all" and len(w.tokens) > 1 else r, "of 13 tokens"),
        (lambda r, w: None if w.top_k else r, "returned None"),
        (lambda r, w: r[0] if w.top_k else r, "not a pair"),
    ],
)  # fmt: skip
def test_a_result_of_the_wrong_form_is_a_breach_of_the_contract(
    rng: np.random.Generator, change: Any, said: str
) -> None:
    class Odd(PackedSession):
        def step(self, work: Sequence[Work]) -> Any:
            return [change(r, w) for r, w in zip(super().step(work), work, strict=True)]

    with pytest.raises(EngineError, match=said):
        Bench(rng).check(Odd)
