"""A step that fails changes nothing: beyond the limits, with bad tokens, with a freed state, out of pages."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from transom.contract import OutOfPages, Work
from transom.testing.bench import Bench
from transom.testing.checks.check import Check, must_raise
from transom.testing.driver import Move, SessionDriver, Track, session_driver
from transom.testing.result import Failed, Refused

MOST = 65_536
"""The most tokens that a check uses to reach a limit."""


def failed_steps_change_nothing(bench: Bench) -> float:
    """After each kind of invalid step, every state has its old length and the next step's logits are right.

    The error is in the last work, so a session that appends before it checks has already changed the first states.
    """
    with session_driver(bench, "failed steps") as driver:
        batch = min(3, driver.limits.max_sequences)
        tracks = [driver.grown(n) for n in (6, 3, 9)[:batch]]
        for what, error, last in _faults(driver, tracks):
            good = [Work(t.state, driver.draw(driver.chunk(2)), "last") for t in tracks[:-1]]
            must_raise(error, f"a step with {what}", lambda g=good, w=last: driver.session.step([*g, w()]))  # type: ignore[misc]
            for track in tracks:
                driver.expect_length(track)
            if batch > 1:
                driver.step([Move(t, driver.draw(driver.chunk(1))) for t in tracks])
            else:
                driver.probe(*tracks)
        return driver.error


def _faults(driver: SessionDriver, tracks: list[Track]) -> Iterator[tuple[str, type[Exception], Callable[[], Work]]]:
    last, size = tracks[-1].state, driver.chunk(2)
    beyond = [*driver.draw(size - 1), driver.vocabulary]
    yield "a token id beyond the vocabulary in its last work", ValueError, lambda: Work(last, beyond)
    yield "a negative token id in its last work", ValueError, lambda: Work(last, [*beyond[:-1], -1])
    yield "no tokens in its last work", ValueError, lambda: Work(last, [])
    if len(tracks) > 1:
        first, tokens = tracks[0].state, driver.draw(size)
        yield "one state used twice", ValueError, lambda: Work(first, tokens)
    freed = driver.grown(2).state
    freed.free()
    tokens = driver.draw(size)
    yield "a freed state in its last work", RuntimeError, lambda: Work(freed, tokens)
    if driver.limits.max_tokens <= MOST and driver.limits.max_tokens < driver.limits.context:
        many = driver.draw(driver.limits.max_tokens + 1)
        yield "more tokens than max_tokens", ValueError, lambda: Work(last, many)
    if classes := driver.limits.token_classes:
        odd = driver.draw(next(n for n in range(1, max(classes) + 2) if n not in classes))
        yield "a chunk whose length is not in token_classes", ValueError, lambda: Work(last, odd)


def context_is_respected(bench: Bench) -> float:
    """A state accepts `limits.context` tokens. One more raises ValueError and changes nothing."""
    with session_driver(bench, "context") as driver:
        if driver.limits.context > driver.context:
            made = driver.context
            raise Failed(f"limits.context is {driver.limits.context}, but the model was made for {made} tokens")
        one = driver.chunk(1)
        track = driver.grown(driver.context - one)
        while len(track.tokens) + one <= driver.context:
            driver.probe(track)
        tokens = driver.draw(one)
        must_raise(ValueError, "a step beyond the context", lambda: driver.session.step([Work(track.state, tokens)]))
        driver.expect_length(track)
        track.state.truncate(len(track.tokens) - one)
        del track.tokens[-one:]
        driver.probe(track)
        return driver.error


def sequence_limit_is_respected(bench: Bench) -> float:
    """A step accepts `max_sequences` works and no more."""
    with session_driver(bench, "sequences") as driver:
        most, one = driver.limits.max_sequences, driver.chunk(1)
        if (most + 1) * one > MOST:
            raise Refused(f"max_sequences {most} is too large for this check")
        try:
            tracks = [driver.new() for _ in range(most + 1)]
        except OutOfPages as e:
            raise Refused(f"the pool cannot hold {most + 1} states: {e}") from e
        if most * one <= driver.limits.max_tokens:
            driver.step([Move(t, driver.draw(one), "last") for t in tracks[:most]])
        work = [Work(t.state, driver.draw(one), "none") for t in tracks]
        must_raise(ValueError, f"a step of {most + 1} sequences", lambda: driver.session.step(work))
        for track in tracks:
            driver.expect_length(track)
        driver.probe(tracks[0])
        return driver.error


def out_of_pages_changes_nothing(bench: Bench) -> float:
    """When the pool is full, step raises OutOfPages and changes no state, and works again after a state is freed."""
    with session_driver(bench, "out of pages") as driver:
        total, _ = driver.session.pages()
        if not total:
            return 0.0  # a contiguous cache has no pool
        if total * driver.limits.page_tokens > MOST:
            tokens = total * driver.limits.page_tokens
            raise Refused(f"a pool of {tokens} tokens is too large to fill; give options that make it smaller")
        full: list[Track] = []
        while True:
            track = driver.new()
            full.append(track)
            try:
                for _ in range(driver.context // driver.chunk(driver.context)):
                    size = driver.chunk(driver.context - len(track.tokens))
                    tokens_now = driver.draw(size)
                    driver.session.step([Work(track.state, tokens_now, "none")])
                    track.tokens += tokens_now
            except OutOfPages:
                break
            held_tokens = sum(len(t.tokens) for t in full)
            if held_tokens > total * driver.limits.page_tokens:
                pages = f"{total} pages of {driver.limits.page_tokens} tokens"
                raise Failed(f"pages() returns {pages}, but {held_tokens} tokens fit")
        for track in full:
            driver.expect_length(track)
        if len(full) < 2:
            return driver.error
        full[0].state.free()
        driver.probe(*[t for t in full[1:] if len(t.tokens) < driver.context][:2])
        return driver.error


def checks() -> list[Check]:
    return [
        Check("failure.changes_nothing", failed_steps_change_nothing),
        Check("limits.context", context_is_respected),
        Check("limits.sequences", sequence_limit_is_respected),
        Check("limits.out_of_pages", out_of_pages_changes_nothing),
    ]
