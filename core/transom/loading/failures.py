"""The failures after which `auto` tries the next offer, and those of them that are remembered for later loads."""

from __future__ import annotations

from transom.artifacts import Cache
from transom.errors import DoesNotFit, EngineError, SelfCheckFailed, TransomError, UnsupportedError
from transom.loading import crashes
from transom.preparation.child import ChildFailed
from transom.preparation.jobs import Job
from transom.preparation.plugin_calls import LoadTimedOut

MOVES_ON = (SelfCheckFailed, EngineError, UnsupportedError, DoesNotFit, ChildFailed)
"""Errors after which `auto` tries the next offer. Others are not the backend's fault and would occur again."""
_CRASHES = ("SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGSEGV", "SIGSYS", "SIGTRAP")
"""Signals caused by native code itself; others come from outside, for example when memory runs out."""


def remember(cache: Cache, job: Job, error: TransomError) -> None:
    """Remember a failure that would occur again: a crash, a hang, a failed check, an unsupported graph."""
    failure = error.failure if isinstance(error, ChildFailed) else None
    if (failure is not None and (failure.signal in _CRASHES or failure.kind == "timeout")) or isinstance(
        error, SelfCheckFailed | UnsupportedError | LoadTimedOut
    ):
        cache.remember("failures", job.failure_key, error.cause)


def remembered(cache: Cache, job: Job) -> TransomError | None:
    """The failure of an earlier load of this job, or of a step after it, or None."""
    cause = cache.recall("failures", job.failure_key, str)
    if cause is None:
        return crashed(cache, job)
    return EngineError(f"{cause.rstrip('.')} (at an earlier load)", "To try it again: transom cache clear")


def crashed(cache: Cache, job: Job) -> TransomError | None:
    """The step of an earlier run that ended its process, or None. Such a model loads and passes its check."""
    cause = cache.recall(crashes.STORE, job.failure_key, str)
    if cause is None:
        return None
    return EngineError(f"{cause.rstrip('.')} (at an earlier run)", "To try it again: transom cache clear")
