"""A compiled model, wherever it is kept, and what its artifact reports."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from transom.artifacts import Origin
    from transom.contract import Artifact

PRECISION = "precision: "
"""How the note of an artifact begins that names its compute precision."""


class CompiledModel(Protocol):
    """A compiled model that a session can be opened from: an artifact of the cache, or a bundle."""

    artifact: Artifact
    origin: Origin

    @property
    def key(self) -> str: ...

    @property
    def scratch(self) -> Path: ...

    def verdict(self, where: str) -> object:
        """The verdict of the self-check in this place (`Machine.place`), or None."""
        ...

    def record_verdict(self, where: str, verdict: object) -> None: ...

    def discard(self, reason: str) -> None:
        """Never open it again as it is."""
        ...

    def release(self) -> None: ...


def precision_and_notes(source_notes: Iterable[str], model: CompiledModel) -> tuple[str, tuple[str, ...]]:
    """The compute precision, empty where the backend does not report it; and the notes, those of the source first."""
    notes = [*source_notes, *model.artifact.notes, *decomposed(model)]
    precision = next((n.removeprefix(PRECISION) for n in notes if n.startswith(PRECISION)), "")
    return precision, tuple(n for n in dict.fromkeys(notes) if not n.startswith(PRECISION))


def decomposed(model: CompiledModel) -> tuple[str, ...]:
    """What was changed in the graph for the backend, one sentence for each change."""
    said = model.origin.ingredients.get("decomposed")
    return tuple(map(str, said)) if isinstance(said, list | tuple) else ()


def is_exact(model: CompiledModel) -> bool:
    """Whether no claim of the backend was approximate: sets the limits of the self-check."""
    return bool(model.origin.ingredients.get("exact", True))


def verdict_text(verdict: object) -> str:
    """The verdict of the self-check as one sentence; empty where there is none."""
    if not isinstance(verdict, dict):
        return ""
    return f"passed, {verdict['text']}" if verdict.get("checked") else str(verdict.get("reason", ""))
