"""A compiled model in the cache or in a bundle, and what its artifact reports."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from transom.artifacts import Origin
    from transom.contract import Artifact

PRECISION = "precision: "
"""Prefix of the artifact note that names the compute precision."""


class CompiledModel(Protocol):
    """A compiled model that a session can be opened from: an artifact of the cache, or a bundle."""

    artifact: Artifact
    origin: Origin

    @property
    def key(self) -> str: ...

    @property
    def scratch(self) -> Path: ...

    def verdict(self, where: str) -> object:
        """The verdict of the self-check for a runtime identity (`Machine.runtime_identity`), or None."""
        ...

    def record_verdict(self, where: str, verdict: object) -> None: ...

    def discard(self, reason: str) -> None:
        """Make sure that it is not opened again in its present state."""
        ...

    def release(self) -> None: ...


def precision_and_notes(source_notes: Iterable[str], model: CompiledModel) -> tuple[str, tuple[str, ...]]:
    """The compute precision (empty where the backend reports none), and the other notes, those of the source first."""
    notes = [*source_notes, *model.artifact.notes, *decomposed(model)]
    precision = next((n.removeprefix(PRECISION) for n in notes if n.startswith(PRECISION)), "")
    return precision, tuple(n for n in dict.fromkeys(notes) if not n.startswith(PRECISION))


def decomposed(model: CompiledModel) -> tuple[str, ...]:
    """The changes made to the graph for the backend, one sentence each."""
    changes = model.origin.ingredients.get("decomposed")
    return tuple(map(str, changes)) if isinstance(changes, list | tuple) else ()


def is_exact(model: CompiledModel) -> bool:
    """Whether all claims of the backend were exact, which decides the limits of the self-check."""
    return bool(model.origin.ingredients.get("exact", True))


def verdict_text(verdict: object) -> str:
    """The verdict of the self-check as one sentence; empty where there is none."""
    if not isinstance(verdict, dict):
        return ""
    return f"passed, {verdict['text']}" if verdict.get("checked") else str(verdict.get("reason", ""))
