"""Checks of what a backend promises about the bits of its logits (`Offer.deterministic`, `Limits.batch_invariant`).

A backend that promises nothing passes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from transom.contract import Session
from transom.testing.bench import Array, Bench, TinyModel
from transom.testing.checks.check import Check
from transom.testing.driver import Move, SessionDriver
from transom.testing.models import BASE
from transom.testing.result import Failed

LENGTHS = (9, 1, 1, 6, 1, 3, 1)
"""Tokens of one sequence in each step."""


def equal_steps_give_equal_bits(bench: Bench) -> None:
    """If the offer is deterministic, the same steps give the same bits: again, and with steps of others between."""
    if not bench.offer().deterministic:
        return
    model = bench.model(BASE)
    first = _steps_of_one(bench, model, others=False)
    for others in (False, True):
        when = "after steps of another sequence" if others else "the second time"
        for i, (wanted, got) in enumerate(zip(first, _steps_of_one(bench, model, others=others), strict=True)):
            _need_equal(got, wanted, f"step {i + 1} gave other bits {when}, although the offer is deterministic")


def _steps_of_one(bench: Bench, model: TinyModel, *, others: bool) -> list[Array]:
    """The logits of the same sequence in the same steps, in a new session."""
    with bench.session(model.artifact) as session:
        driver, other = _driver(bench, session, model, "steps"), _driver(bench, session, model, "other steps")
        track, beside = driver.new(), other.new()
        rows = []
        for wanted in LENGTHS:
            if others:
                other.step([Move(beside, other.draw(other.chunk(wanted + 1)))])
            rows.append(np.array(driver.step([Move(track, driver.draw(driver.chunk(wanted)))])[0]))
        return rows


def a_batch_changes_no_bits(bench: Bench) -> None:
    """If the session is batch-invariant, no bit of a sequence depends on how its tokens are divided among steps, or on
    the sequences that share them."""
    model = bench.model(BASE)
    with bench.session(model.artifact) as session:
        if not session.limits.batch_invariant:
            return
        driver = _driver(bench, session, model, "batches")
        count = min(4, driver.limits.max_sequences)
        texts = [driver.draw(sum(driver.chunk(n) for n in LENGTHS)) for _ in range(count)]
        alone = [_divided(driver, [text], LENGTHS)[0] for text in texts]
        whole = [] if driver.limits.token_classes else [(len(texts[0]),), (1,) * len(texts[0])]
        for lengths in (LENGTHS, LENGTHS[::-1], *whole):
            for wanted, got in zip(alone, _divided(driver, texts, lengths), strict=True):
                _need_equal(
                    got, wanted, "a sequence got other bits in other steps, although the session is batch-invariant"
                )


def _divided(driver: SessionDriver, texts: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[Array]:
    """The logits of each sequence, float32 [tokens, vocabulary]; a step has some tokens of every one."""
    tracks = [driver.new() for _ in texts]
    rows: list[list[Array]] = [[] for _ in texts]
    for wanted in lengths:
        moves = []
        for track, text in zip(tracks, texts, strict=True):
            at = len(track.tokens)
            moves.append(Move(track, text[at : at + min(driver.chunk(wanted), len(text) - at)]))
        for found, output in zip(rows, driver.step(moves), strict=True):
            found.append(np.array(output))
    for track in tracks:
        track.state.free()
    return [np.concatenate(found) for found in rows]


def _driver(bench: Bench, session: Session, model: TinyModel, name: str) -> SessionDriver:
    return SessionDriver(session, model, bench.rng(name))


def _need_equal(got: Array, wanted: Array, what: str) -> None:
    if not np.array_equal(got, wanted):
        raise Failed(f"{what}: {int((got != wanted).sum())} of {wanted.size} logits differ")


def checks() -> list[Check]:
    return [
        Check("step.deterministic", equal_steps_give_equal_bits),
        Check("step.batch_invariant", a_batch_changes_no_bits),
    ]
