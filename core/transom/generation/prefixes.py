"""Caches of sequences that have ended, kept for prompts that begin alike: a conversation's next turn reads what is new.

Only sessions with a pool of pages keep any: what is kept is pages that nobody needs yet, and it gives way first. A
sequence is taken up where a step of its own could have begun, so that an answer is the same whether its prompt was read
anew or not: at a whole page where all keys are read, at a whole chunk where a policy chooses among them step by step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from transom.contract import State

MOST = 8
"""Sequences that are kept; the one used longest ago goes first."""
SPARE_SHARE = 32
"""A prompt that shares nothing with what is kept leaves of it at most 1/32 of a context: fresh pages are memory that
the process had not touched before."""
LEAST_NEW = 8
"""Fewer rows in a step go other ways through an engine, and round otherwise: where a prompt's last step would have had
as many, it has to have them here."""


class Kept(NamedTuple):
    """A sequence whose cache is kept."""

    tokens: list[int]
    """As many as the state holds."""
    state: State
    sparsity: str | None


class Prefixes:
    """What is kept. The engine's leader alone may use it.

    Args:
        page: tokens in a page of the session's pool; 0: it has none, and nothing is kept.
        chunk: tokens of a prompt that a step reads.
        context: tokens that one sequence may have.
    """

    def __init__(self, page: int, chunk: int, context: int) -> None:
        self._page, self._chunk = page, chunk
        self._spare = context // SPARE_SHARE
        self._kept: list[Kept] = []

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def latest(self) -> Kept | None:
        """What was kept last."""
        return self._kept[-1] if self._kept else None

    def keep(self, tokens: Sequence[int], state: State, sparsity: str | None) -> None:
        """Keep an ended sequence's state, or free it. It replaces those that it goes on from.

        Args:
            tokens: of the sequence, at least as many as the state holds.
            sparsity: the policy that its steps obeyed.
        """
        held = list(tokens[: state.length])
        if not self._page or len(held) < self._page:
            state.free()
            return
        for other in list(self._kept):
            if other.sparsity == sparsity and held[: len(other.tokens)] == other.tokens:
                self._drop(other)
        self._kept.append(Kept(held, state, sparsity))
        while len(self._kept) > MOST:
            self._drop(self._kept[0])

    def take(self, tokens: Sequence[int], sparsity: str | None, *, chosen: bool) -> State | None:
        """A state with the longest beginning of a prompt that is kept; the caller owns it.

        Args:
            chosen: a policy chooses keys step by step.

        Raises:
            OutOfPages: as `State.fork`.
        """
        best: Kept | None = None
        longest = 0
        for kept in self._kept:
            if kept.sparsity != sparsity:
                continue
            usable = self._usable(_common(kept.tokens, tokens), len(tokens), chosen=chosen)
            if usable > longest:
                best, longest = kept, usable
        if best is None:
            while sum(len(kept.tokens) for kept in self._kept) > self._spare and self.give_up():
                continue
            return None
        state = best.state.fork(longest)
        self._kept.remove(best)
        self._kept.append(best)
        return state

    def _usable(self, common: int, total: int, *, chosen: bool) -> int:
        """How many of the tokens in common may be taken up."""
        last = total % self._chunk  # tokens in the last step of a prompt that is read from its beginning
        grain = self._chunk if chosen or 0 < last < LEAST_NEW else self._page
        usable = common // grain * grain
        while usable > 0 and (
            total == usable or (0 < (total - usable) % self._chunk < LEAST_NEW and grain == self._page)
        ):
            usable -= grain
        return max(usable, 0)

    def give_up(self) -> bool:
        """Free the one used longest ago; whether there was one."""
        if not self._kept:
            return False
        self._drop(self._kept[0])
        return True

    def clear(self) -> None:
        """Free all."""
        while self.give_up():
            pass

    def _drop(self, kept: Kept) -> None:
        self._kept.remove(kept)
        kept.state.free()


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that two sequences have in common from their beginning."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
