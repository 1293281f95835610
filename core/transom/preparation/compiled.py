"""A compiled model in the cache or in a bundle, and what its artifact reports."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, Protocol, TypedDict, TypeVar

if TYPE_CHECKING:
    from transom.artifacts import Origin
    from transom.contract import Artifact
    from transom.signature import Decoder

T = TypeVar("T")

PRECISION = "precision: "
"""Prefix of the artifact note that names the compute precision."""


class Checked(TypedDict):
    """The verdict of the self-check, as it is remembered: whether outputs were compared, with the numbers of
    `Agreement`, or why not."""

    checked: bool
    text: NotRequired[str]
    reason: NotRequired[str]
    ran_only: NotRequired[bool]
    positions: NotRequired[int]
    kl_mean: NotRequired[float]
    kl_max: NotRequired[float]
    correlation_min: NotRequired[float]
    top1: NotRequired[float]
    max_abs: NotRequired[float]


class CompiledModel(Protocol):
    """A compiled model that a session can be opened from: an artifact of the cache, or a bundle."""

    artifact: Artifact
    origin: Origin

    @property
    def key(self) -> str: ...

    @property
    def scratch(self) -> Path: ...

    def verdict(self, where: str, kind: type[T]) -> T | None:
        """The verdict of the self-check for a runtime identity (`Machine.runtime_identity`); None where there is none
        of this type, which is `Checked`."""
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
    return tuple(model.origin.ingredients.get("decomposed", ()))


def is_exact(model: CompiledModel) -> bool:
    """Whether all claims of the backend were exact, which decides the limits of the self-check."""
    return model.origin.ingredients.get("exact", True)


@dataclass(frozen=True)
class Allowed:
    """The limits of the self-check."""

    kl: float
    """Largest mean divergence from the reference, nats."""
    correlation: float
    """Lowest correlation of the logits at any position."""

    def accepts(self, kl: float, correlation: float) -> bool:
        """False for NaN."""
        return kl <= self.kl and correlation >= self.correlation

    def __str__(self) -> str:
        return f"allowed are {self.kl:g} nats and a correlation of {self.correlation:g}"


EXACT = Allowed(0.05, 0.99)
"""For exact claims. On the models tried, bfloat16 arithmetic stays below 0.005 nats and above 0.999; a wrong layer or a
corrupt cache is above 1 nat or below 0.5."""
APPROXIMATE = Allowed(0.15, 0.9)
"""For approximate claims without a declared divergence. Int8 weights with int8 activations stay below this on the
models tried; an attention scale that is half too large does not (0.3 nats)."""
LARGEST_DIVERGENCE = 0.5
"""Nats. A backend that declares more is held to this."""


def declared_divergence(model: CompiledModel) -> float | None:
    """The divergence that the backend declared for approximate claims, nats; None if it declared none."""
    found = model.origin.ingredients.get("divergence")
    return found if found is not None and found > 0 else None


def allowed(model: CompiledModel) -> Allowed:
    """The limits of the self-check, as the claims of the backend set them."""
    if is_exact(model):
        return EXACT
    declared = declared_divergence(model)
    if declared is None:
        return APPROXIMATE
    return Allowed(min(declared, LARGEST_DIVERGENCE), APPROXIMATE.correlation)


def divergence(decoder: Decoder | None, verdict: Checked | None) -> float | None:
    """The mean divergence that the self-check found, nats; None without a check, or for another graph than a
    decoder's."""
    if decoder is None or verdict is None or not verdict["checked"]:
        return None
    return verdict.get("kl_mean")


def verdict_text(verdict: Checked | None) -> str:
    """The verdict of the self-check as one sentence; empty where there is none."""
    if verdict is None:
        return ""
    if not verdict["checked"]:
        return verdict.get("reason", "")
    return f"passed, {verdict['text']}" if "text" in verdict else "passed"
