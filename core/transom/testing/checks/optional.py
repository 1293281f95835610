"""Checks of the optional protocols of a session: reading by a sparsity policy, and saving states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from transom.contract import Work
from transom.contract_optional import SavingSession, SparseSession
from transom.sparsity import Sparsity
from transom.testing.bench import Bench
from transom.testing.checks.check import Check, must_raise
from transom.testing.driver import Move, SessionDriver, Track, session_driver
from transom.testing.models import BASE
from transom.testing.result import Failed

EVERYTHING = Sparsity(coverage=1.0, local_window=64, min_density=1.0, dense_below=0).to_string()
FEW, FEW_WIDE = (
    Sparsity(coverage=0.2, local_window=1, columns=4, unit=unit, dense_below=0, max_density=0.5).to_string()
    for unit in (8, 16)
)
"""Sparse policies. The second is for a session that refuses units of 8."""
LENGTH = 150
"""Tokens of a sequence: a policy can leave out keys from the third block of 64 queries on."""


def policies_are_obeyed_or_refused(bench: Bench) -> float:
    """A work may name a sparsity policy. A session without sparsity raises ValueError and changes nothing. A session
    with sparsity reads all keys if the policy leaves none out, fewer if it does, and counts the keys that it reads."""
    with session_driver(bench, "sparsity") as driver:
        session = driver.session
        track = driver.grown(min(LENGTH, driver.context - 24))
        if isinstance(session, SparseSession):
            _reads_by_policies(session, driver, len(track.tokens))
            wrong = "no policy"
        else:
            wrong = FEW
        works = lambda: session.step([Work(track.state, driver.draw(driver.chunk(1)), "none", sparsity=wrong)])  # noqa: E731
        must_raise(ValueError, f"a work with the sparsity {wrong!r}", works)
        driver.expect_length(track)
        driver.probe(track)
        return driver.error


def _reads_by_policies(session: SparseSession, driver: SessionDriver, length: int) -> None:
    layers = driver.model.oracle.decoder.layers
    shape = (2, len(layers), max(layer.kv_heads for layer in layers))

    def fed(policy: str) -> tuple[Track, Any]:
        track = driver.new()
        while len(track.tokens) < length:
            tokens = driver.draw(driver.chunk(length - len(track.tokens)))
            if policy == EVERYTHING:
                driver.step([Move(track, tokens, sparsity=policy)])
            else:
                (rows,) = session.step([Work(track.state, tokens, "all", sparsity=policy)])
                if not np.isfinite(np.asarray(rows)).all():
                    raise Failed("reading by a policy gave logits that are not finite")
                track.tokens += tokens
                driver.expect_length(track)
        counts = np.asarray(session.keys_read(track.state))
        if counts.shape != shape or counts.dtype != np.float64:
            raise Failed(f"keys_read returned {counts.dtype} {list(counts.shape)}, not float64 {list(shape)}")
        return track, counts

    track, (read, seen) = fed(EVERYTHING)
    if not np.array_equal(read, seen):
        raise Failed(f"under a policy that leaves nothing out, {read.sum():g} of {seen.sum():g} keys were read")
    least = sum(layer.kv_heads for layer in layers) * length * (length + 1) / 2
    if seen.sum() < least:
        raise Failed(f"{length} tokens see at least {least:g} keys; keys_read returned {seen.sum():g}")
    forked = track.state.fork(length)
    if np.asarray(session.keys_read(forked)).any():
        raise Failed("a fork must start to count at 0")
    forked.free()
    must_raise(RuntimeError, "keys_read of a freed state", lambda: session.keys_read(forked))
    _, (read, seen) = fed(_obeyed(session, driver))
    if not 0 < read.sum() < seen.sum():
        raise Failed(f"under a policy that leaves much out, {read.sum():g} of {seen.sum():g} keys were read")


def _obeyed(session: SparseSession, driver: SessionDriver) -> str:
    """A policy that leaves much out and that the session accepts: the one with units of 8, or else the wider one."""
    track = driver.new()
    work = [Work(track.state, driver.draw(driver.chunk(1)), "none", sparsity=FEW)]
    try:
        session.step(work)
    except ValueError:
        driver.expect_length(track)
        return FEW_WIDE
    track.state.free()
    return FEW


def saved_states_go_on(bench: Bench) -> float:
    """A session that can save states restores them, after the original was freed and also in another session of the
    same artifact. Arrays that are not a complete state raise ValueError."""
    model = bench.model(BASE)
    with bench.session(model.artifact) as session, bench.session(model.artifact) as other:
        if not isinstance(session, SavingSession):
            if half := [name for name in ("save", "restore") if hasattr(session, name)]:
                raise Failed(f"the session has only {half[0]}; the protocol needs both save and restore")
            return 0.0  # the session does not save states
        driver = SessionDriver(session, model, bench.rng("saving"))
        track = driver.grown(min(LENGTH, driver.context - 24))
        tokens, saved = track.tokens, _copied(session.save(track.state))
        track.state.free()
        must_raise(RuntimeError, "saving a freed state", lambda: session.save(track.state))
        for where in (session, other):
            assert isinstance(where, SavingSession)
            again = SessionDriver(where, model, driver.rng)
            made = Track(where.restore(len(tokens), _copied(saved)), list(tokens))
            again.expect_length(made)
            again.probe(made, made)
            driver.error = max(driver.error, again.error)
            made.state.free()
        for name in saved:
            rest = {n: a for n, a in saved.items() if n != name}
            must_raise(ValueError, f"restoring without {name!r}", _restoring(session, len(tokens), rest))
            cut = saved | {name: saved[name][:-1]}
            must_raise(ValueError, f"restoring with {name!r} cut short", _restoring(session, len(tokens), cut))
        return driver.error


def _copied(arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {name: np.array(array) for name, array in arrays.items()}


def _restoring(session: SavingSession, length: int, arrays: Mapping[str, Any]) -> Any:
    return lambda: session.restore(length, _copied(arrays))


def checks() -> list[Check]:
    return [
        Check("sparsity.policies", policies_are_obeyed_or_refused),
        Check("state.saving", saved_states_go_on),
    ]
