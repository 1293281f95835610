"""Drives an engine by hand in tests: requests with samplers, their answers, and the expected answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fakes import FakeSession, logits_after

from transom.generation.engine import Engine
from transom.generation.params import SamplingParams
from transom.generation.requests import Request, TokenEvent
from transom.generation.sampling import Sampler


def alone(session: FakeSession, prompt: Sequence[int], params: SamplingParams, count: int) -> list[list[int]]:
    """The expected answers, computed without engine, cache or batch."""
    answers = []
    for index in range(params.n):
        sampler = Sampler(params, session.vocabulary, prompt=prompt, index=index)
        tokens = list(prompt)
        for _ in range(count):
            row = logits_after(tokens, session.vocabulary, session.spread)
            tokens.append(sampler.sample(row).token)
        answers.append(tokens[len(prompt) :])
    return answers


def request(session: FakeSession, prompt: Sequence[int], params: SamplingParams, count: int, **options: Any) -> Request:
    samplers = [Sampler(params, session.vocabulary, prompt=prompt, index=i) for i in range(params.n)]
    return Request(prompt, samplers, max_new_tokens=count, **options)


def read(engine: Engine, asked: Request) -> list[list[int]]:
    answers: list[list[int]] = [[] for _ in asked.branches]
    while (event := engine.next_event(asked)) is not None:
        if isinstance(event, TokenEvent):
            answers[event.branch].append(event.id)
    return answers


def settled(session: FakeSession, engine: Engine) -> None:
    """Check that nothing leaked, except what is kept on purpose, and that the session's rules were followed."""
    assert session.violations == []
    if not engine.closed:
        assert len(session.live) == engine.kept
        engine.forget()
    assert session.live == set()
    assert session.free_pages == session.total_pages
