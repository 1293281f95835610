"""Measures a short decode on each kind of device, to choose between them. The speeds are remembered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from transom.artifacts import artifact_key
from transom.loading import failures
from transom.loading.attempts import Attempt, known_failure
from transom.preparation.jobs import MEASURE

if TYPE_CHECKING:
    from transom.loading.cached_models import CachedModels
    from transom.loading.machine import Machine
    from transom.selection import Selection


def measured_speeds(models: CachedModels, machine: Machine, choice: Selection) -> dict[str, float]:
    """Tokens per second by `Candidate.key` for `choice.kinds_to_measure`, remembered or measured now.

    A candidate that fails has 0. Empty for a graph that is not a decoder, which has no decode to time.
    """
    attempts: Sequence[Attempt] = [Attempt(machine, choice, candidate) for candidate in choice.kinds_to_measure]
    source = models.source(attempts[0])
    if source is not None and source.decoder is None:
        return {}
    state = models.state
    # Models of the same size within a power of two share a measurement.
    scale = source.decoder.weight_bytes.bit_length() if source is not None and source.decoder else 0
    found: dict[str, float] = {}
    for attempt in attempts:
        key = artifact_key(
            {"place": attempt.runtime_identity, "bits": scale, "as": state.options.for_backend["precision"]}
        )
        known = state.cache.recall("speeds", key, float)
        if known is None or known <= 0:
            known = _measure(models, attempt)
            if known:
                state.cache.remember("speeds", key, known)
        found[attempt.candidate.key] = known
    return found


def _measure(models: CachedModels, attempt: Attempt) -> float:
    jobs, state = models.jobs, models.state
    if known_failure(jobs, attempt) is not None:
        return 0.0
    with state.stages.time(f"measure {attempt.device.id}"):
        try:
            return float(jobs.run(MEASURE, attempt))
        except failures.MOVES_ON as error:  # it is ranked last; if it is tried later, loading reports the error
            failures.remember(state.cache, jobs.job(attempt), error)
            return 0.0
