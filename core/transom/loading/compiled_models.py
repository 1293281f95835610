"""The interface by which a load gets its compiled model, from the cache or from a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from transom.loading.attempts import Attempt
    from transom.loading.child_jobs import ChildJobs
    from transom.preparation.cached_source import CachedSource
    from transom.preparation.compiled import Checked, CompiledModel
    from transom.preparation.memory import MemoryPlan


@dataclass(frozen=True)
class Ready:
    """A compiled model that may be opened here, or that was compiled for another machine."""

    source: CachedSource
    compiled: CompiledModel
    verdict: Checked | None
    """Verdict of the self-check; None where there was no check."""
    plan: MemoryPlan | None
    """The memory plan; None for a graph that is not a decoder."""
    slower: str = ""
    """The backend's reason why a newly compiled model would be faster; empty where it would not."""


@dataclass(frozen=True)
class NotReady:
    """There is no compiled model that may be opened here."""

    reason: str = ""
    """Why the existing one may not be opened; empty where none exists."""


class CompiledModels(Protocol):
    """The compiled models of one load."""

    jobs: ChildJobs
    bundle: str
    """The bundle's folder; empty for the cache."""

    def find(self, attempt: Attempt) -> Ready | NotReady:
        """The existing compiled model for an attempt. Compiles nothing and starts no process.

        Raises:
            DoesNotFit, OptionError: as `memory.plan`.
            EngineError: the backend reports that it can never run here, or failed to answer.
        """
        ...

    def prepare(self, attempt: Attempt) -> Ready:
        """The compiled model, compiled and checked in a child process first if necessary.

        Raises:
            TransomError: it cannot be compiled, or does not pass the self-check.
        """
        ...

    def reference_outputs(self, attempt: Attempt, source: CachedSource) -> Mapping[str, Any]:
        """The reference outputs: `ids` and `logits` for the check prompt, or the outputs by name of another graph."""
        ...
