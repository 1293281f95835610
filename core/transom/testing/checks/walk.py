"""Random walks: many states, operations in random order, each step compared with the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from transom.contract import OutOfPages, Work
from transom.testing.bench import Bench
from transom.testing.checks.check import Check, must_raise
from transom.testing.checks.states import fork, truncate
from transom.testing.driver import Move, SessionDriver, Track, session_driver

STEPS = 120
MOST_STATES = 6


def _walk(variant: str) -> Callable[[Bench], float]:
    def run(bench: Bench) -> float:
        with session_driver(bench, f"walk {variant}", variant) as driver:
            rng, tracks = driver.rng, [driver.new()]
            for _ in range(STEPS):
                track: Track = tracks[rng.integers(len(tracks))]
                match rng.choice(["step"] * 5 + ["fork", "fork", "truncate", "free", "new", "fail"]):
                    case "step":
                        _step(driver, tracks)
                    case "fork" if len(tracks) < MOST_STATES:
                        tracks.append(fork(track, _cut(driver, track)))
                        if rng.random() < 0.5:
                            _step(driver, [track, tracks[-1]])  # both append in one step, right after the fork
                    case "truncate":
                        truncate(track, _cut(driver, track))
                        _step(driver, [track])
                    case "free" if len(tracks) > 1:
                        track.state.free()
                        tracks.remove(track)
                    case "new" if len(tracks) < MOST_STATES:
                        tracks.append(driver.new())
                    case "fail":
                        bad = [*driver.draw(driver.chunk(2) - 1), driver.vocabulary + 5]
                        must_raise(ValueError, "a wrong token", lambda: driver.session.step([Work(track.state, bad)]))  # noqa: B023
                for each in tracks:
                    driver.expect_length(each)
            return driver.error

    run.__doc__ = f"{STEPS} random operations on up to {MOST_STATES} states of a decoder with {variant}."
    return run


def _longest(driver: SessionDriver) -> int:
    """The longest sequence of a walk: more than two pages, but short enough to be quick."""
    return min(driver.context, max(48, 2 * driver.limits.page_tokens + 8))


def _cut(driver: SessionDriver, track: Track) -> int:
    """A random length. Half of the time the whole length, like a prompt that is completed twice."""
    length = len(track.tokens)
    whole = length < _longest(driver) and driver.rng.random() < 0.5
    return length if whole else int(driver.rng.integers(length + 1))


_LOGITS: tuple[Literal["none", "last", "all"], ...] = ("none", "last", "all")


def _step(driver: SessionDriver, tracks: list[Track]) -> None:
    rng = driver.rng
    count = int(rng.integers(1, min(len(tracks), driver.limits.max_sequences) + 1))
    moves = []
    for i in rng.permutation(len(tracks))[:count]:
        size = driver.chunk(int(rng.choice([1, 1, 1, 2, 5, 9])))
        if len(tracks[i].tokens) + size <= _longest(driver):
            moves.append(Move(tracks[i], driver.draw(size), _LOGITS[int(rng.integers(len(_LOGITS)))]))
    if not moves:
        return
    try:
        driver.step(moves)
    except OutOfPages:  # a small pool: nothing may have changed, and pages are freed as a host would do
        for track in tracks:
            driver.expect_length(track)
        truncate(max(tracks, key=lambda t: len(t.tokens)), 0)


def checks() -> list[Check]:
    return [Check(f"walk.{variant}", _walk(variant)) for variant in ("gqa", "window")]
