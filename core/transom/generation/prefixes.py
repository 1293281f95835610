"""Keeps the caches of ended sequences for prompts with the same beginning: the next turn of a conversation reads only
new text.

Only sessions with a pool of pages keep caches. They use pages that are not needed otherwise, and are evicted first. A
cache is reused only up to a point where a step of the new sequence could have begun, so that the answer is the same as
without reuse: a multiple of a page if all keys are read, a multiple of a chunk if a policy selects keys step by step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from transom.contract import State

MAX_SEQUENCES = 8
"""Maximum number of sequences kept; the least recently used one is evicted first."""
SPARE_SHARE = 32
"""A prompt that shares no beginning shrinks the kept caches to 1/32 of a context, so that it can reuse their pages,
whose memory is already resident."""
MIN_NEW_TOKENS = 8
"""Engines compute steps with fewer rows differently, with other rounding. If a prompt's last step would have at least
this many rows without reuse, it must also have them with reuse."""


class CachedPrefix(NamedTuple):
    """An ended sequence whose cache is kept."""

    tokens: list[int]
    """The tokens that the state holds."""
    state: State
    sparsity: str | None
    salt: str


class PrefixCache:
    """The kept sequences, least recently used first. Only the engine's leader may use it.

    Args:
        page: tokens per page of the session's pool; 0: there is no pool, and nothing is kept.
        chunk: maximum number of prompt tokens per step.
        context: maximum number of tokens per sequence.
    """

    def __init__(self, page: int, chunk: int, context: int) -> None:
        self._page, self._chunk = page, chunk
        self._spare = context // SPARE_SHARE
        self._kept: list[CachedPrefix] = []

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def latest(self) -> CachedPrefix | None:
        """The most recently used sequence."""
        return self._kept[-1] if self._kept else None

    def keep(self, tokens: Sequence[int], state: State, sparsity: str | None, salt: str = "") -> None:
        """Keep an ended sequence's state, or free it. It replaces sequences that it extends.

        Args:
            tokens: tokens of the sequence, at least as many as the state holds.
            sparsity: the policy of its steps.
            salt: that of its request.
        """
        held = list(tokens[: state.length])
        if not self._page or len(held) < self._page:
            state.free()
            return
        for other in list(self._kept):
            if (other.sparsity, other.salt) == (sparsity, salt) and held[: len(other.tokens)] == other.tokens:
                self._drop(other)
        self._kept.append(CachedPrefix(held, state, sparsity, salt))
        while len(self._kept) > MAX_SEQUENCES:
            self._drop(self._kept[0])

    def take(self, tokens: Sequence[int], sparsity: str | None, salt: str = "", *, selects_keys: bool) -> State | None:
        """A state, owned by the caller, with the longest kept beginning of a prompt, of those with the same policy and
        salt; None if there is none.

        Args:
            selects_keys: a policy selects keys step by step.

        Raises:
            OutOfPages: see `State.fork`.
        """
        best: CachedPrefix | None = None
        longest = 0
        for kept in self._kept:
            if (kept.sparsity, kept.salt) != (sparsity, salt):
                continue
            usable = self._usable(_common(kept.tokens, tokens), len(tokens), selects_keys=selects_keys)
            if usable > longest:
                best, longest = kept, usable
        if best is None:
            while sum(len(kept.tokens) for kept in self._kept) > self._spare and self.evict_oldest():
                continue
            return None
        state = best.state.fork(longest)
        self._kept.remove(best)
        self._kept.append(best)
        return state

    def _usable(self, common: int, total: int, *, selects_keys: bool) -> int:
        """How many of the common tokens may be reused."""
        last = total % self._chunk  # tokens in the last step if the whole prompt is read
        grain = self._chunk if selects_keys or 0 < last < MIN_NEW_TOKENS else self._page
        usable = common // grain * grain
        while usable > 0 and (
            total == usable or (0 < (total - usable) % self._chunk < MIN_NEW_TOKENS and grain == self._page)
        ):
            usable -= grain
        return max(usable, 0)

    def evict_oldest(self) -> bool:
        """Free the least recently used sequence. Returns whether there was one."""
        if not self._kept:
            return False
        self._drop(self._kept[0])
        return True

    def clear(self) -> None:
        """Free all."""
        while self.evict_oldest():
            pass

    def _drop(self, kept: CachedPrefix) -> None:
        self._kept.remove(kept)
        kept.state.free()


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix of two sequences."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
