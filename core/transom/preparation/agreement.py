"""How far two sets of logits, or of other outputs, agree.

There are two measures, because each can be fooled: the Kullback–Leibler divergence misses garbage when the model's own
distribution is nearly flat, and the correlation misses a wrong temperature.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

DECODES = 3
"""Tokens at the end of the check prompt that are fed one at a time, so that decoding with a cache is checked too."""
SAME = 1e-3
"""Logits whose root mean square difference is below this count as equal: no probability changes by 1 %."""


@dataclass(frozen=True)
class Agreement:
    """How far two sets of logits agree, over all positions."""

    positions: int
    kl_mean: float
    """Kullback–Leibler divergence of the engine from the reference, nats, mean over positions."""
    kl_max: float
    correlation_min: float
    """Lowest Pearson correlation of the logits at any position; 1 where they are equal (`SAME`)."""
    top1: float
    """Share of positions with the same most likely token."""
    max_abs: float
    """Largest difference of any logit."""

    def to_dict(self) -> dict[str, float]:
        return asdict(self)

    def __str__(self) -> str:
        if self.kl_mean == float("inf"):
            return "the engine's numbers are not finite"
        return (
            f"mean KL {self.kl_mean:.2g} nats, worst correlation {self.correlation_min:.5f}, same best token "
            f"{self.top1:.0%} of {self.positions} positions"
        )


def compare(expected: Array, got: Array) -> Agreement:
    """Compare logits [positions, vocabulary]. Values that are not finite give an infinite divergence.

    Raises ValueError for different shapes.
    """
    a, b = np.asarray(expected, np.float64), np.asarray(got, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"logits of shape {b.shape}, expected {a.shape}")
    top1 = float(np.mean(a.argmax(-1) == b.argmax(-1)))
    if not np.isfinite(b).all():
        return Agreement(len(a), float("inf"), float("inf"), -1.0, top1, float("inf"))
    log_p, log_q = log_softmax(a), log_softmax(b)
    kl = np.maximum((np.exp(log_p) * (log_p - log_q)).sum(-1), 0.0)
    correlation = _correlation(a, b)
    return Agreement(
        len(a), float(kl.mean()), float(kl.max()), float(correlation.min()), top1, float(np.abs(a - b).max())
    )


def agreements(expected: Array, got: Array) -> list[Agreement]:
    """Compare the logits of a check prompt: over all positions, and over the decoded tokens alone.

    The mean over all positions would hide an error that only the few decoded tokens have.
    """
    found = [compare(expected, got)]
    if len(got) > DECODES:
        found.append(compare(expected[-DECODES:], got[-DECODES:]))
    return found


def cosine(a: Array, b: Array) -> float:
    """Mean cosine similarity of the rows of two sets of logits; 0 where it is not finite."""
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    found = float(((x * y).sum(-1) / np.where(norms == 0, 1.0, norms)).mean())
    return found if np.isfinite(found) else 0.0


def _correlation(a: Array, b: Array) -> Array:
    """The correlation of each row. It is undefined for rows without variance; for these only the difference counts."""
    x, y = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    same = np.sqrt(np.square(x - y).mean(-1)) <= SAME
    norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    result: Array = np.where(same, 1.0, (x * y).sum(-1) / np.where(norms == 0, np.inf, norms))
    return result


def log_softmax(x: Array) -> Array:
    """Logarithms of the softmax over the last axis, in the dtype of `x`."""
    x = x - x.max(-1, keepdims=True)
    result: Array = x - np.log(np.exp(x).sum(-1, keepdims=True))
    return result


def compare_outputs(expected: Mapping[str, Array], got: Mapping[str, Any]) -> Agreement:
    """Compare the floating-point outputs of a graph that is not a decoder, each as one row.

    The mean square difference, relative to the mean square of the reference output, takes the place of the divergence.
    """
    errors, correlations, largest = [], [], 0.0
    for name, wanted in expected.items():
        if wanted.dtype.kind != "f" or wanted.size == 0:
            continue
        if name not in got or np.shape(got[name]) != wanted.shape:
            raise ValueError(f"the output {name} is missing or of the wrong shape")
        keep = np.isfinite(wanted)
        a, b = np.asarray(wanted, np.float64)[keep][None], np.asarray(got[name], np.float64)[keep][None]
        if not np.isfinite(b).all():
            return Agreement(1, float("inf"), float("inf"), -1.0, 0.0, float("inf"))
        if not a.size:
            continue
        errors.append(float(np.square(a - b).mean() / max(float(np.square(a).mean()), 1e-12)))
        correlations.append(float(_correlation(a, b).min()) if a.size > 2 else 1.0)
        largest = max(largest, float(np.abs(a - b).max()))
    if not errors:
        return Agreement(0, 0.0, 0.0, 1.0, 1.0, 0.0)
    return Agreement(len(errors), float(np.mean(errors)), max(errors), min(correlations), 1.0, largest)
