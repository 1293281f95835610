"""Checks of logits of small decoders against the reference: prefill, chunks, decoding, ragged batches, output forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from transom.contract import Work
from transom.testing.bench import Bench
from transom.testing.checks.check import Check, must_raise
from transom.testing.driver import Move, session_driver
from transom.testing.models import VARIANTS
from transom.testing.result import Failed


def _decodes(variant: str) -> Callable[[Bench], float]:
    def run(bench: Bench) -> float:
        with session_driver(bench, f"decode {variant}", variant) as driver:
            track = driver.new()
            for wanted in (11, 1, 1, 1, 6, 1, 1):  # prefill, decoding, a chunk after a filled cache, decoding
                size = driver.chunk(wanted)
                if len(track.tokens) + size <= driver.context:
                    driver.step([Move(track, driver.draw(size))])
            whole = driver.new()
            driver.feed(whole, track.tokens)  # the same tokens at once
            return driver.error

    run.__doc__ = f"A decoder with {variant}: prefill, chunks and decoding give the logits of the whole sequence."
    return run


def one_token_prompts_work(bench: Bench) -> float:
    """A sequence can start with a single token (or the shortest chunk that the session accepts)."""
    with session_driver(bench, "one token") as driver:
        track = driver.new()
        driver.step([Move(track, driver.draw(driver.chunk(1)), "last")])
        driver.probe(track)
        return driver.error


def long_sequences_work(bench: Bench) -> float:
    """A sequence that fills the whole context has right logits at its end."""
    with session_driver(bench, "long") as driver:
        track = driver.grown(driver.context - driver.chunk(1))
        while len(track.tokens) + driver.chunk(1) <= driver.context:
            driver.probe(track)
        return driver.error


def ragged_batches_work(bench: Bench) -> float:
    """One step with prefill and decoding of different lengths gives each sequence the same logits as alone."""
    with session_driver(bench, "ragged") as driver:
        count = driver.several(5)
        tracks = [driver.grown(n) for n in (9, 0, 3, 17, 0)[:count]]
        for lengths in ((1, 7, 1, 4, 1), (1, 1, 5, 1, 2), (1, 1, 1, 1, 1)):
            order = driver.rng.permutation(count)  # the host chooses the order of the works
            driver.step([Move(tracks[i], driver.draw(driver.chunk(lengths[i]))) for i in order])
        return driver.error


def ragged_batches_work_with_windows(bench: Bench) -> float:
    """The same for a decoder with sliding windows, soft caps, sinks and biases at once."""
    with session_driver(bench, "ragged windows", "everything") as driver:
        tracks = [driver.grown(n) for n in (12, 0, 5)[: driver.several(3)]]
        for lengths in ((1, 8, 1), (3, 1, 1), (1, 1, 6)):
            driver.step([Move(t, driver.draw(driver.chunk(n))) for t, n in zip(tracks, lengths, strict=False)])
        return driver.error


def logits_come_in_the_form_asked_for(bench: Bench) -> float:
    """`"none"` gives None, `"last"` one row, `"all"` every row; float32, in the order of the works."""
    with session_driver(bench, "forms") as driver:
        for form in ("none", "last", "all"):
            track = driver.new()
            driver.step([Move(track, driver.draw(driver.chunk(5)), form)])
            driver.probe(track)
        if driver.limits.max_sequences >= 3:
            tracks = [driver.grown(n) for n in (4, 2, 6)]
            forms: Any = zip(tracks, (3, 1, 4), ("last", "none", "all"), strict=True)
            driver.step([Move(t, driver.draw(driver.chunk(n)), form) for t, n, form in forms])
            tracks = tracks[::-1]
            driver.step([Move(t, driver.draw(driver.chunk(2)), "none") for t in tracks])
            driver.probe(*tracks)
        return driver.error


def top_k_is_best_first(bench: Bench) -> float:
    """top_k gives (int64 ids, float32 logits) of the k highest logits, best first, for one row and for all rows."""
    with session_driver(bench, "top_k") as driver:
        track = driver.new()
        for k, form in ((1, "last"), (5, "last"), (5, "all"), (driver.vocabulary, "last")):
            driver.step([Move(track, driver.draw(driver.chunk(4)), form, k)])  # type: ignore[arg-type]
        if driver.limits.max_sequences >= 2:
            other = driver.grown(3)
            driver.step(
                [Move(track, driver.draw(driver.chunk(1)), "last", 3), Move(other, driver.draw(driver.chunk(2)), "all")]
            )
        return driver.error


def outputs_belong_to_the_caller(bench: Bench) -> None:
    """No later call writes into a returned array, and writing into one does not affect later steps."""
    with session_driver(bench, "aliasing") as driver:
        track = driver.grown(4)
        kept: list[tuple[Any, Any]] = []

        def keep(output: Any) -> None:
            for part in output if isinstance(output, tuple) else (output,):
                kept.append((part, np.array(np.asarray(part))))

        for form, k in (("all", 0), ("last", 0), ("last", 4), ("all", 0), ("last", 0)):
            output = driver.step([Move(track, driver.draw(driver.chunk(2)), form, k)])[0]  # type: ignore[arg-type]
            keep(output)
        other = driver.grown(6)
        track.state.truncate(len(track.tokens) - 1)
        del track.tokens[-1]
        driver.probe(other, track)
        scribbled = np.asarray(driver.step([Move(other, driver.draw(driver.chunk(2)))])[0])
        if scribbled.flags.writeable:
            scribbled[...] = np.nan
        driver.probe(other, track)
        other.state.free()
        driver.session.close()
        for array, copy in kept:
            if not np.array_equal(np.asarray(array), copy):
                raise Failed("a later call wrote into logits that had been returned")


def wrong_tokens_are_refused(bench: Bench) -> None:
    """A token id below or above the vocabulary raises ValueError."""
    with session_driver(bench, "tokens") as driver:
        for token in (-1, driver.vocabulary, 1 << 31, 1 << 40):
            tokens = [*driver.draw(driver.chunk(3) - 1), token]
            state = driver.session.new_state()
            must_raise(ValueError, f"the token id {token}", lambda s=state, t=tokens: driver.session.step([Work(s, t)]))  # type: ignore[misc]


def checks() -> list[Check]:
    return [
        *(Check(f"logits.{variant}", _decodes(variant)) for variant in VARIANTS),
        Check("logits.one_token", one_token_prompts_work),
        Check("logits.whole_context", long_sequences_work),
        Check("step.ragged", ragged_batches_work),
        Check("step.ragged_windows", ragged_batches_work_with_windows),
        Check("step.forms", logits_come_in_the_form_asked_for),
        Check("step.top_k", top_k_is_best_first),
        Check("step.outputs_belong_to_caller", outputs_belong_to_the_caller),
        Check("step.wrong_tokens", wrong_tokens_are_refused),
    ]
