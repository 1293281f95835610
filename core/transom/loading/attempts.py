"""Attempts to load a model: the candidates (a backend on a device) are tried in order until one works."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from transom.errors import DoesNotFit, SelectionError, TransomError
from transom.loading import crashes, failures

if TYPE_CHECKING:
    from transom.contract import Device
    from transom.loading.child_jobs import ChildJobs
    from transom.loading.machine import Machine
    from transom.plugins import LoadedBackend
    from transom.selection import Candidate, Selection

T = TypeVar("T")


@dataclass(frozen=True)
class Attempt:
    """An attempt to load a model with one candidate, a backend on a device."""

    machine: Machine
    choice: Selection
    candidate: Candidate
    set_aside: Sequence[tuple[Candidate, TransomError]] = ()
    """The candidates that failed before this one, with their errors."""
    crashed: TransomError | None = None
    """The error of an earlier run in which a step ended the process. Set only if there is no other candidate."""

    @property
    def plugin(self) -> LoadedBackend:
        return self.machine.plugins.backends[self.candidate.backend]

    @property
    def device(self) -> Device:
        return self.candidate.device

    @property
    def runs_here(self) -> bool:
        """Whether the device is in this machine. If not, the model is only compiled for it."""
        return self.candidate.offer.runs_here

    @property
    def runtime_identity(self) -> str:
        """Hardware, driver and versions for which a verdict holds, see `Machine.runtime_identity`."""
        return self.machine.runtime_identity(self.candidate)

    def why(self) -> str:
        """Why this candidate is used, in one or two sentences."""
        if self.candidate is self.choice.ranked[0]:
            return self.choice.why
        names = ", ".join(f"{c.backend} on {c.device.id}" for c, _ in self.set_aside)
        here = f"{self.candidate.backend} on {self.device.id}: {self.candidate.offer.why}"
        return f"{here}. Set aside before it: {names}."

    def warnings(self) -> list[str]:
        before = [f"{c.backend} on {c.device.id} was set aside: {error.cause}" for c, error in self.set_aside]
        return before if self.crashed is None else [*before, self.crashed.cause]


def first_that_works(jobs: ChildJobs, machine: Machine, choice: Selection, use: Callable[[Attempt], T]) -> T:
    """The result of `use` for the first candidate that works.

    The candidates respect the device and backend that the user named.

    Raises:
        TransomError: as `use` raised it, where there is one candidate only, or none fits into memory.
        SelectionError: no candidate works; the details give the reasons.
    """
    crashes.collect(jobs.state.cache)
    set_aside: list[tuple[Candidate, TransomError]] = []
    alone = len(choice.ranked) == 1
    for candidate in choice.ranked:
        attempt = Attempt(machine, choice, candidate, tuple(set_aside))
        if alone:
            attempt = replace(attempt, crashed=failures.crashed(jobs.state.cache, jobs.job(attempt)))
        elif (known := known_failure(jobs, attempt)) is not None:
            set_aside.append((candidate, known))
            continue
        try:
            return use(attempt)
        except failures.MOVES_ON as error:
            if alone:
                raise
            failures.remember(jobs.state.cache, jobs.job(attempt), error)
            set_aside.append((candidate, error))
    if all(isinstance(error, DoesNotFit) for _, error in set_aside):
        raise set_aside[0][1]
    raise SelectionError(
        "No backend could run this model",
        set_aside[0][1].fix or "Fix one of these, or try another model",
        [line for c, error in set_aside for line in f"{c.backend} on {c.device.id}: {error}".splitlines()],
    )


def known_failure(jobs: ChildJobs, attempt: Attempt) -> TransomError | None:
    """The failure of an earlier load with the same candidate, so that it need not be tried again."""
    return failures.remembered(jobs.state.cache, jobs.job(attempt)) if jobs.state.options.verify == "auto" else None
