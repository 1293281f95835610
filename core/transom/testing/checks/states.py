"""Checks of sequence states: forks, copy on write, truncating, freeing, lengths, bytes and pages."""

from __future__ import annotations

from transom.contract import Session, State, Work
from transom.testing.bench import Bench
from transom.testing.checks.check import Check, must_raise
from transom.testing.driver import Move, SessionDriver, Track, session_driver
from transom.testing.result import Failed


def _cuts(driver: SessionDriver, length: int) -> list[int]:
    """Lengths for forking or truncating a state of `length` tokens: the ends, the middle, around page boundaries."""
    page = driver.limits.page_tokens or 4
    edges = {page * n + d for n in range(1, length // page + 1) for d in (-1, 0, 1)}
    return sorted(n for n in {0, 1, length // 2, length - 1, length, *sorted(edges)[:6]} if 0 <= n <= length)


def _length(driver: SessionDriver) -> int:
    """A length of two and a half pages, or less if pages are large."""
    page = driver.limits.page_tokens or 4
    return max(6, min(2 * page + page // 2, driver.context - 8))


def fork(track: Track, length: int) -> Track:
    return Track(track.state.fork(length), track.tokens[:length])


def truncate(track: Track, length: int) -> None:
    track.state.truncate(length)
    del track.tokens[length:]


def forks_continue_from_where_they_share(bench: Bench) -> float:
    """A fork at any length, also inside a page, continues as if it had been prefilled alone; so does its parent."""
    with session_driver(bench, "fork") as driver:
        parent = driver.grown(_length(driver))
        for cut in _cuts(driver, len(parent.tokens)):
            child = fork(parent, cut)
            driver.expect_length(child)
            driver.step([Move(child, driver.draw(driver.chunk(3)))])
            driver.probe(child)
            child.state.free()
        driver.probe(parent)
        return driver.error


def forks_do_not_see_each_others_writes(bench: Bench) -> float:
    """Copy on write: parent and siblings append in turns after the same shared token, and do not affect each other."""
    with session_driver(bench, "copy on write") as driver:
        page = driver.limits.page_tokens or 4
        parent = driver.grown(min(page + max(1, page // 2), driver.context - 8))
        family = [parent, fork(parent, len(parent.tokens)), fork(parent, len(parent.tokens)), fork(parent, 1)]
        family.append(fork(family[1], len(family[1].tokens)))  # a fork of a fork
        for _ in range(3):
            for member in family:
                driver.probe(member)
        if driver.limits.max_sequences >= len(family):  # the family in one step
            driver.step([Move(m, driver.draw(driver.chunk(1))) for m in family])
        return driver.error


def forks_outlive_their_parent(bench: Bench) -> float:
    """Freeing or truncating the parent does not affect the fork, and the other way round."""
    with session_driver(bench, "parents") as driver:
        parent = driver.grown(_length(driver))
        kept, lost = fork(parent, len(parent.tokens) - 1), fork(parent, len(parent.tokens))
        lost.state.free()
        driver.probe(parent)
        truncate(parent, 2)
        driver.step([Move(parent, driver.draw(driver.chunk(4)))])
        driver.probe(kept)
        parent.state.free()
        strangers = [driver.grown(5) for _ in range(3)]  # these would get pages that were released too early
        driver.probe(kept, *strangers)
        return driver.error


def truncated_states_go_on(bench: Bench) -> float:
    """After truncate at any length, the state continues with other tokens as if the removed ones had never existed."""
    with session_driver(bench, "truncate") as driver:
        for cut in _cuts(driver, _length(driver)):
            track = driver.grown(_length(driver))
            truncate(track, min(cut, len(track.tokens)))
            driver.expect_length(track)
            driver.step([Move(track, driver.draw(driver.chunk(3)))])
            driver.probe(track)
            track.state.free()
        return driver.error


def truncated_windows_go_on(bench: Bench) -> float:
    """The same with a sliding window: after truncate, keys that had left the window must be available again."""
    with session_driver(bench, "truncate window", "window") as driver:
        track = driver.grown(24)
        for cut in (20, 9, 3):
            child = fork(track, cut)
            truncate(track, cut)
            driver.step([Move(track, driver.draw(driver.chunk(2)))])
            driver.step([Move(child, driver.draw(driver.chunk(2)))])
            driver.probe(track, child)
            child.state.free()
        return driver.error


def truncating_a_fork_leaves_its_family(bench: Bench) -> float:
    """truncate and later writes on a fork do not change pages that others share."""
    with session_driver(bench, "truncate fork") as driver:
        parent = driver.grown(_length(driver))
        child = fork(parent, len(parent.tokens))
        truncate(child, len(parent.tokens) // 2)
        driver.step([Move(child, driver.draw(driver.chunk(4)))])
        driver.probe(parent, child)
        return driver.error


def bounds_are_checked(bench: Bench) -> None:
    """fork and truncate beyond the length, or below zero, raise ValueError and change nothing."""
    with session_driver(bench, "bounds") as driver:
        track = driver.grown(6)
        for length in (len(track.tokens) + 1, 10_000, -1):
            must_raise(ValueError, f"fork({length})", lambda n=length: track.state.fork(n))  # type: ignore[misc]
            must_raise(ValueError, f"truncate({length})", lambda n=length: track.state.truncate(n))  # type: ignore[misc]
        driver.expect_length(track)
        driver.probe(track)


def freed_states_are_gone(bench: Bench) -> None:
    """Freeing twice does nothing. step, fork and truncate raise RuntimeError on a freed state; others still work."""
    with session_driver(bench, "free") as driver:
        other, track = driver.grown(5), driver.grown(7)
        state: State = track.state
        state.free()
        state.free()
        tokens = driver.draw(driver.chunk(1))
        must_raise(RuntimeError, "step on a freed state", lambda: driver.session.step([Work(state, tokens)]))
        must_raise(RuntimeError, "fork of a freed state", lambda: state.fork(0))
        must_raise(RuntimeError, "truncate of a freed state", lambda: state.truncate(0))
        driver.probe(other)


def states_say_what_they_hold(bench: Bench) -> None:
    """length counts tokens. nbytes is positive for a state with tokens, and forks do not count shared pages again."""
    with session_driver(bench, "bytes") as driver:
        empty = driver.new()
        if empty.state.length != 0:
            raise Failed(f"a new state has length {empty.state.length}")
        track = driver.grown(_length(driver))
        held = track.state.nbytes
        if not isinstance(held, int) or held <= 0:
            raise Failed(f"nbytes of a state of {len(track.tokens)} tokens is {held!r}")
        if not isinstance(empty.state.nbytes, int) or not 0 <= empty.state.nbytes <= held:
            raise Failed(f"nbytes of an empty state is {empty.state.nbytes!r}")
        child = fork(track, len(track.tokens))
        if child.state.nbytes > held:
            raise Failed(f"nbytes of a fork is {child.state.nbytes}, of its parent {held}")
        if track.state.nbytes < held // 2 and child.state.nbytes == 0:
            raise Failed("after a fork, no state counts the shared pages")


def pages_come_back(bench: Bench) -> None:
    """With a paged cache, states take pages and release all of them; a fork takes fewer pages than a copy."""
    with session_driver(bench, "pages") as driver:
        total, free = driver.session.pages()
        if not total:
            return  # a contiguous cache has (0, 0) pages, which session.limits checks
        track = driver.grown(_length(driver))
        taken = free - driver.session.pages()[1]
        if taken <= 0:
            raise Failed(f"{len(track.tokens)} tokens took no pages")
        children = [fork(track, len(track.tokens)) for _ in range(3)]
        if free - driver.session.pages()[1] >= 4 * taken:
            raise Failed("forks take as many pages as copies would")
        for child in children:
            driver.probe(child)
        for member in (track, *children):
            member.state.free()
        _expect_free(driver.session, free)


def _expect_free(session: Session, wanted: int) -> None:
    if (now := session.pages()[1]) != wanted:
        raise Failed(f"{wanted} pages were free before, {now} after every state was freed")


def checks() -> list[Check]:
    return [
        Check("state.fork", forks_continue_from_where_they_share),
        Check("state.copy_on_write", forks_do_not_see_each_others_writes),
        Check("state.outlives_parent", forks_outlive_their_parent),
        Check("state.truncate", truncated_states_go_on),
        Check("state.truncate_window", truncated_windows_go_on),
        Check("state.truncate_fork", truncating_a_fork_leaves_its_family),
        Check("state.bounds", bounds_are_checked),
        Check("state.free", freed_states_are_gone),
        Check("state.bytes", states_say_what_they_hold),
        Check("state.pages", pages_come_back),
    ]
