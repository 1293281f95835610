"""What makes `auto` try the next offer, and what of that is remembered, so that no later load waits for it again."""

from __future__ import annotations

from transom.artifacts import Cache
from transom.errors import DoesNotFit, EngineError, SelfCheckFailed, TransomError, UnsupportedError
from transom.preparation.child import ChildFailed
from transom.preparation.jobs import Job

MOVES_ON = (SelfCheckFailed, EngineError, UnsupportedError, DoesNotFit, ChildFailed)
"""What makes `auto` try the next offer. Anything else is no fault of the backend and would come back."""
_CRASHES = ("SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGSEGV", "SIGSYS", "SIGTRAP")
"""Signals that native code brings on itself; others come from outside, as when memory runs out."""


def remember(cache: Cache, job: Job, error: TransomError) -> None:
    """Keep a failure that would come back: a crash, a failed check, an unsupported graph."""
    crashed = isinstance(error, ChildFailed) and error.failure is not None and error.failure.signal in _CRASHES
    if crashed or isinstance(error, SelfCheckFailed | UnsupportedError):
        cache.remember("failures", job.failure_key, error.cause)


def remembered(cache: Cache, job: Job) -> TransomError | None:
    """What an earlier load of this job failed with."""
    cause = cache.recall("failures", job.failure_key)
    if not isinstance(cause, str):
        return None
    return EngineError(f"{cause.rstrip('.')} (at an earlier load)", "To have it tried again: transom cache clear")
