"""The contract session: sequences one after the other, each with a cache of its own that grows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from transom.contract import Limits, State, Tensor, Work
from transom.graph.weights import Array
from transom.sessions import check_step, split_logits
from transom.signature import Decoder
from transom_mobile_export.genai.lowering import PAST
from transom_mobile_export.genai.running import Runner

SEQUENCES, TOKENS = 64, 4096
"""Of one step, at most."""
CHUNK = 512
"""Tokens that run at once where not all logits are wanted: those of a long prompt would fill the memory."""
GRAIN = 256
"""A cache holds a multiple of so many tokens."""


class GrowingState:
    """The cache of one sequence, longer than what it holds."""

    def __init__(self, session: DecoderSession, cache: list[Array], length: int = 0) -> None:
        self.session, self._cache, self._length = session, cache, length
        self._freed = False

    @property
    def length(self) -> int:
        return self._length

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._cache)

    @property
    def cache(self) -> list[Array]:
        if self._freed:
            raise RuntimeError("this sequence state was freed")
        return self._cache

    def fork(self, length: int) -> GrowingState:
        cache = self.cache
        if not 0 <= length <= self._length:
            raise ValueError(f"cannot fork at {length}: the state holds {self._length} tokens")
        return self.session.made([buffer[:, :, :length] for buffer in cache], length)

    def truncate(self, length: int) -> None:
        if not 0 <= length <= (self._length if self.cache else 0):
            raise ValueError(f"cannot truncate to {length}: the state holds {self._length} tokens")
        self._length = length

    def grown(self, tokens: int) -> list[Array]:
        """The cache with room for so many more tokens."""
        cache = self.cache
        needed, capacity = self._length + tokens, cache[0].shape[2]
        if needed > capacity:
            cache = self.session.room([b[:, :, : self._length] for b in cache], max(needed, 2 * capacity))
            self._cache = cache
        return cache

    def append(self, tokens: int) -> None:
        """Take what was written behind the end for its own."""
        self._length += tokens

    def free(self) -> None:
        self._freed, self._cache, self._length = True, [], 0


class DecoderSession:
    """A `transom.contract.SavingSession`.

    Args:
        context: tokens that one state may hold.
    """

    def __init__(self, runner: Runner, decoder: Decoder, context: int) -> None:
        self._runner, self._decoder = runner, decoder
        self._limits = Limits(SEQUENCES, max(TOKENS, context), context, page_tokens=0)
        self._closed = False

    @property
    def limits(self) -> Limits:
        return self._limits

    def pages(self) -> tuple[int, int]:
        return (0, 0)

    def new_state(self) -> GrowingState:
        self._need_open()
        return GrowingState(self, self._runner.new_cache(0))

    def room(self, parts: Sequence[Array], capacity: int) -> list[Array]:
        """A cache of at least so many tokens that begins with these parts."""
        least = min(max(capacity, 1), self._limits.context)
        cache = self._runner.new_cache(-(-least // GRAIN) * GRAIN)
        for buffer, part in zip(cache, parts, strict=True):
            buffer[:, :, : part.shape[2]] = part
        return cache

    def made(self, parts: Sequence[Array], length: int) -> GrowingState:
        """A state of so many tokens whose cache is a copy of these parts."""
        return GrowingState(self, self.room(parts, length) if length else self._runner.new_cache(0), length)

    def step(self, work: Sequence[Work]) -> Sequence[Tensor | tuple[Tensor, Tensor] | None]:
        self._need_open()
        states = [self._own(w.state) for w in work]
        check_step(work, self._limits, self._decoder.vocabulary)
        results = [self._computed(state, w) for state, w in zip(states, work, strict=True)]
        for state, w in zip(states, work, strict=True):  # cannot fail: until here no state has changed
            state.append(len(w.tokens))
        return results

    def _computed(self, state: GrowingState, work: Work) -> Tensor | tuple[Tensor, Tensor] | None:
        """What a work gets. The state's cache has its tokens behind the end afterwards."""
        tokens, cache = np.asarray(work.tokens, np.int64), state.grown(len(work.tokens))
        rows: list[Array] = []
        for at in range(0, len(tokens), CHUNK):
            logits = self._runner.run(tokens[at : at + CHUNK], state.length + at, cache)
            rows = [*rows, logits] if work.logits == "all" else [logits[-1:]]
        found = np.concatenate(rows) if work.logits == "all" else rows[-1]
        wanted = {"none": 0, "last": 1, "all": len(tokens)}[work.logits]
        return split_logits(found[:wanted], [work], [len(tokens)], copy=len(rows) == 1)[0]

    def run(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        self._need_open()
        raise RuntimeError("this session keeps the cache of its decoder itself; call step()")

    def save(self, state: State) -> Mapping[str, Tensor]:
        """What a state holds by the input's name, [KV heads, tokens, columns]."""
        self._need_open()
        own = self._own(state)
        return {name: buffer[0, :, : own.length].copy() for name, buffer in zip(self._names(), own.cache, strict=True)}

    def restore(self, length: int, arrays: Mapping[str, Tensor]) -> GrowingState:
        """A state out of what `save` gave.

        Raises:
            ValueError: these are no arrays of a state of so many tokens.
        """
        self._need_open()
        if not 0 <= length <= self._limits.context:
            raise ValueError(f"{length} tokens exceed the context of {self._limits.context} tokens")
        parts = []
        for name, like in zip(self._names(), self._runner.new_cache(0), strict=True):
            part = np.asarray(arrays.get(name, ()))
            if part.dtype != like.dtype or part.shape != (like.shape[1], length, like.shape[3]):
                raise ValueError(f"{name} is not that of {length} tokens")
            parts.append(part[None])
        return self.made(parts, length)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._runner.close()

    def _names(self) -> list[str]:
        return [PAST.format(i, part) for i in range(len(self._decoder.layers)) for part in ("key", "value")]

    def _own(self, state: State) -> GrowingState:
        if not isinstance(state, GrowingState) or state.session is not self:
            raise ValueError("this sequence state belongs to another session")
        state.cache  # noqa: B018  a freed state raises here, before anything runs
        return state

    def _need_open(self) -> None:
        if self._closed:
            raise RuntimeError("this session is closed")
