"""Where a load finds its compiled model. There are two places: the cache and a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from transom.loading.attempts import Attempt
    from transom.loading.child_jobs import ChildJobs
    from transom.preparation.cached_source import CachedSource
    from transom.preparation.compiled import CompiledModel
    from transom.preparation.memory import MemoryPlan


@dataclass(frozen=True)
class Ready:
    """A compiled model that may be opened here, or that is only compiled for another machine."""

    source: CachedSource
    compiled: CompiledModel
    verdict: object
    """Of the self-check, JSON types."""
    plan: MemoryPlan | None
    """None for a graph that is not a decoder."""
    slower: str = ""
    """Why the backend says that a newly compiled one would be faster."""


@dataclass(frozen=True)
class NotReady:
    """There is no compiled model that may be opened here."""

    reason: str = ""
    """Why the one that is there may not be opened; empty where there is none."""


class CompiledModels(Protocol):
    """The compiled models of one load."""

    jobs: ChildJobs
    bundle: str
    """The bundle's folder; empty for the cache."""

    def find(self, attempt: Attempt) -> Ready | NotReady:
        """The compiled model for an attempt. Compiles nothing and starts no process.

        Raises:
            DoesNotFit, OptionError: as `memory.plan`.
            EngineError: the backend says that it can never run here, or failed to answer.
        """
        ...

    def prepare(self, attempt: Attempt) -> Ready:
        """The compiled model, compiled and checked in a child process where that has not been done.

        Raises:
            TransomError: it cannot be compiled, or does not pass the self-check.
        """
        ...

    def reference_outputs(self, attempt: Attempt, source: CachedSource) -> Mapping[str, Any]:
        """The reference's outputs for the check prompt: `ids` and `logits`; of a graph that is not a decoder its own
        outputs by name."""
        ...
