"""Measures the speed of a session by a short timed decode, to choose between kinds of device."""

from __future__ import annotations

import time

import numpy as np

from transom.contract import Session, State
from transom.preparation.session_uses import Array, SessionTask, advance

TIMED_TOKENS = 24
"""Tokens generated in a timed decode."""


def decode_rate(session: Session, ids: list[int]) -> float:
    """Tokens per second of a short greedy decode. The first quarter warms the engine up and does not count."""
    context = session.limits.context
    ids = ids[: max(1, context // 2)]
    state = session.new_state()
    try:
        times = []
        row = _last_row(session, state, ids)
        for _ in range(min(TIMED_TOKENS, context - len(ids))):
            token = int(row.argmax())
            start = time.perf_counter()
            row = _last_row(session, state, [token])
            times.append(time.perf_counter() - start)
    finally:
        state.free()
    return 1.0 / max(float(np.median(times[len(times) // 4 :])), 1e-9) if times else 0.0


def _last_row(session: Session, state: State, tokens: list[int]) -> Array:
    row: Array = advance(session, [SessionTask(state, tokens, "last")])[0]
    return row
