"""A contract session over an engine that runs one sequence at a time and writes its cache into arrays in place.

The session keeps the arrays of each sequence, grows them as they fill, copies them for a fork, and saves them. Data
behind a sequence's tokens is ignored, so a step that fails changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from transom.contract import Limits, State, Tensor, Work
from transom.sessions.steps import Array, check_step, need_within, split_logits

Buffers = Mapping[str, Array]
"""The cache of one sequence by the names of its parts: arrays [1, heads, rows, columns]."""


class BufferedEngine(Protocol):
    """Computes a decoder over arrays from the caller, and keeps none of them."""

    def capacity(self, tokens: int) -> int:
        """Tokens to allocate room for when `tokens` are needed; at least `tokens`."""

    def new_buffers(self, capacity: int) -> Buffers:
        """Arrays with room for `capacity` tokens, a number that `capacity()` returned."""

    def rows(self, name: str, tokens: int) -> int:
        """Rows that `tokens` tokens fill in a part of the cache; `tokens` if each token has one row."""

    def compute(self, tokens: Array, past: int, buffers: Buffers, *, every: bool) -> Array:
        """Run the new tokens of a sequence and append their keys and values to its cache.

        After a failure it may be called again with the same or a smaller `past`, and must then ignore what it wrote
        before.

        Args:
            tokens: int64 [new], one or more.
            past: tokens in the cache.
            buffers: the cache, with room for the new tokens.
            every: return the logits of every new token.

        Returns:
            float32 [new, vocabulary], or [1, vocabulary] for the last token; the array belongs to the caller.
        """

    def close(self) -> None: ...


class BufferedState:
    """The cache of one sequence: a `State` of the contract."""

    def __init__(self, session: BufferedSession, capacity: int, buffers: Buffers, length: int = 0) -> None:
        self.session, self.capacity, self._length = session, capacity, length
        self._buffers: Buffers | None = buffers

    @property
    def buffers(self) -> Buffers:
        if self._buffers is None:
            raise RuntimeError("this sequence state was freed")
        return self._buffers

    @property
    def length(self) -> int:
        return self._length

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (self._buffers or {}).values())

    def fork(self, length: int) -> BufferedState:
        buffers = self.buffers
        need_within(length, self._length, "fork")
        return self.session.copied(buffers, length)

    def truncate(self, length: int) -> None:
        self.buffers  # noqa: B018  a freed state raises here
        need_within(length, self._length, "truncate")
        self._length = length

    def grow(self, capacity: int, buffers: Buffers) -> None:
        """Replace the arrays with longer ones that hold the same tokens."""
        self.capacity, self._buffers = capacity, buffers

    def append(self, tokens: int) -> None:
        """Count the tokens that were written behind the end."""
        self._length += tokens

    def free(self) -> None:
        self._buffers, self._length, self.capacity = None, 0, 0


class BufferedSession:
    """A `transom.contract_optional.SavingSession`.

    Args:
        vocabulary: columns of the logits.
        limits: of a step and of a state; the engine runs the sequences of a step one after another.
    """

    def __init__(self, engine: BufferedEngine, vocabulary: int, limits: Limits) -> None:
        self._engine, self._vocabulary, self._limits = engine, vocabulary, limits
        self._closed = False

    @property
    def limits(self) -> Limits:
        return self._limits

    def pages(self) -> tuple[int, int]:
        return (0, 0)

    def new_state(self) -> BufferedState:
        self._need_open()
        return self.copied({}, 0)

    def copied(self, buffers: Buffers, length: int) -> BufferedState:
        """A state of `length` tokens with a copy of their part of the arrays."""
        capacity = self._engine.capacity(length)
        return BufferedState(self, capacity, self._room(buffers, length, capacity), length)

    def _room(self, buffers: Buffers, length: int, capacity: int) -> Buffers:
        """New arrays of `capacity` tokens that start with a copy of the first `length` tokens."""
        fresh = self._engine.new_buffers(capacity)
        for name, array in buffers.items():
            rows = self._engine.rows(name, length)
            fresh[name][:, :, :rows] = array[:, :, :rows]
        return fresh

    def step(self, work: Sequence[Work]) -> Sequence[Tensor | tuple[Tensor, Tensor] | None]:
        self._need_open()
        states = [self._own(w.state) for w in work]
        check_step(work, self._limits, self._vocabulary)
        results = [self._computed(state, w) for state, w in zip(states, work, strict=True)]
        for state, w in zip(states, work, strict=True):  # cannot fail; no state has changed before
            state.append(len(w.tokens))
        return results

    def _computed(self, state: BufferedState, work: Work) -> Tensor | tuple[Tensor, Tensor] | None:
        """The result of one work. Its tokens are then stored behind the end of the state's cache."""
        count = len(work.tokens)
        needed = state.length + count
        if needed > state.capacity:  # doubled, so that a long answer copies its cache only a few times
            capacity = self._engine.capacity(min(max(needed, 2 * state.capacity), self._limits.context))
            state.grow(capacity, self._room(state.buffers, state.length, capacity))
        tokens = np.asarray(work.tokens, np.int64)
        logits = self._engine.compute(tokens, state.length, state.buffers, every=work.logits == "all")
        return split_logits(logits[: 0 if work.logits == "none" else None], [work], [count], copy=False)[0]

    def save(self, state: State) -> Mapping[str, Tensor]:
        """The cache of a state, by the name of its part: [heads, rows, columns]."""
        self._need_open()
        own = self._own(state)
        return {name: a[0, :, : self._engine.rows(name, own.length)].copy() for name, a in own.buffers.items()}

    def restore(self, length: int, arrays: Mapping[str, Tensor]) -> BufferedState:
        """A state from the output of `save`.

        Raises:
            ValueError: the arrays do not fit a state of `length` tokens.
        """
        self._need_open()
        if not 0 <= length <= self._limits.context:
            raise ValueError(f"{length} tokens exceed the context of {self._limits.context} tokens")
        given: dict[str, Array] = {}
        for name, like in self._engine.new_buffers(self._engine.capacity(0)).items():
            array = given[name] = np.asarray(arrays.get(name, ()))[None]
            rows = self._engine.rows(name, length)
            if array.dtype != like.dtype or array.shape != (*like.shape[:2], rows, like.shape[3]):
                raise ValueError(f"{name} does not fit a state of {length} tokens")
        return self.copied(given, length)

    def run(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        self._need_open()
        raise RuntimeError("this session keeps the cache of its decoder itself; call step()")

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._engine.close()

    def _own(self, state: State) -> BufferedState:
        if not isinstance(state, BufferedState) or state.session is not self:
            raise ValueError("this sequence state belongs to another session")
        state.buffers  # noqa: B018  a freed state raises here, before anything runs
        return state

    def _need_open(self) -> None:
        if self._closed:
            raise RuntimeError("this session is closed")
