"""How the logits of quantized graphs agree with the reference's, as rows of a result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class TextAgreement:
    """One precision against the reference, on one text."""

    table: str
    precision: str
    text: str
    tokens: int
    divergence: float
    """Mean Kullback-Leibler divergence from the reference, nats."""
    same_best: float
    """Share of the positions with the same best token."""
    cosine: float
    """Mean over the positions."""
    cosine_least: float

    def __str__(self) -> str:
        return (
            f"{self.table}, {self.precision}, {self.text}: KL {self.divergence:.4f} nats, best {self.same_best:.1%}, "
            f"cosine {self.cosine:.4f}, at least {self.cosine_least:.4f}"
        )


def agreement(table: str, precision: str, text: str, expected: Array, got: Array) -> TextAgreement:
    """Compare logits [tokens, vocabulary]."""
    a, b = expected.astype(np.float64), got.astype(np.float64)
    log_p, log_q = (x - x.max(-1, keepdims=True) for x in (a, b))
    log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (log_p, log_q))
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    divergence = float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean())
    same = float((a.argmax(-1) == b.argmax(-1)).mean())
    return TextAgreement(table, precision, text, len(a), divergence, same, float(cosine.mean()), float(cosine.min()))
