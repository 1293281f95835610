"""The share of keys that each layer reads along a prompt, as a heat map of sparse attention shows it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from transom.contract import Work
from transom.contract_optional import SparseSession
from transom.errors import OptionError

if TYPE_CHECKING:
    from transom.generation.model import Model

STEP = 256
"""Tokens of a prompt that one step reads and one measurement covers."""


@dataclass(frozen=True)
class Densities:
    """Shares of the keys that were read, along a prompt."""

    ends: tuple[int, ...]
    """The end position of each part of the prompt."""
    shares: np.ndarray[Any, np.dtype[np.float64]]
    """float64 [layers, parts, KV heads], NaN where a layer has fewer heads: share of the visible keys that was read."""

    @property
    def by_layer(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """float64 [layers, parts]: mean over the KV heads."""
        means: np.ndarray[Any, np.dtype[np.float64]] = np.nanmean(self.shares, -1)
        return means

    def to_dict(self) -> dict[str, Any]:
        """JSON types, by layer and part."""
        return {"ends": list(self.ends), "densities": np.round(self.by_layer, 4).tolist()}


def along(model: Model, tokens: Sequence[int], progress: Callable[[int, int], None] | None = None) -> Densities:
    """Read a prompt in parts, with the policy that the model was loaded with.

    Args:
        tokens: token ids, at least one.
        progress: called with (tokens read, all tokens).

    Raises:
        OptionError: the model reads every key, or its backend does not count them.
        TransomError: as the model's steps do.
    """
    if model._loaded.sparsity.dense:
        raise OptionError("This model reads every key", "Choose a policy: --sparsity balanced")
    ends: list[int] = []
    parts: list[Any] = []
    with model._engine.exclusive() as session:
        if not isinstance(session, SparseSession):
            raise OptionError(
                f"The backend {model.report.backend} does not count the keys that it reads",
                "Use one that does, such as --backend reference",
            )
        state = session.new_state()
        try:
            before: Any = 0
            for at in range(0, len(tokens), STEP):
                session.step([Work(state, tokens[at : at + STEP], "none")])
                counts = np.asarray(session.keys_read(state))
                with np.errstate(invalid="ignore"):
                    read, seen = counts - before
                    parts.append(read / seen)
                before = counts
                ends.append(min(at + STEP, len(tokens)))
                if progress:
                    progress(ends[-1], len(tokens))
        finally:
            state.free()
    return Densities(tuple(ends), np.stack(parts, 1))
