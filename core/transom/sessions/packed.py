"""A contract session for graphs that carry their cache in inputs and outputs.

`PackedSession` gives a backend that only runs a graph, tensors in and tensors out, sequence states, forks, ragged steps
and all-or-nothing failure. It keeps the cache of each sequence in host memory, in float32. Every step copies the caches
of its sequences, so a backend with a cache of its own is faster.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from transom.contract import Limits, State, Tensor, Work
from transom.sessions.inputs import decoder_inputs, empty_cache
from transom.sessions.steps import Array, check_step, logit_rows, need_within, split_logits
from transom.signature import Decoder, cache_output_names

Run = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""Runs the graph once: arrays by input name -> arrays by output name."""


class PackedState:
    """The cache of one sequence: keys and values of each layer, [tokens, heads * dim]."""

    def __init__(self, cache: list[Array], length: int, shared: int = 0) -> None:
        self._cache: list[Array] | None = cache
        self._length = length
        self._shared = shared  # leading tokens whose memory the parent state counts

    @property
    def cache(self) -> list[Array]:
        if self._cache is None:
            raise RuntimeError("this sequence state was freed")
        return self._cache

    @property
    def length(self) -> int:
        return self._length

    @property
    def nbytes(self) -> int:
        return sum(part[self._shared :].nbytes for part in self._cache or ())

    def fork(self, length: int) -> PackedState:
        cache = self.cache
        need_within(length, self.length, "fork")
        return PackedState([part[:length] for part in cache], length, length)  # shared: arrays are never written to

    def truncate(self, length: int) -> None:
        cache = self.cache
        need_within(length, self.length, "truncate")
        if self._shared < length < self.length:  # a copy, since a view would keep the memory of the rest
            self._cache, self._shared = [part[:length].copy() for part in cache], 0
        else:
            self._cache, self._shared = [part[:length] for part in cache], min(self._shared, length)
        self._length = length

    def append(self, cache: list[Array], tokens: int) -> None:
        """Replace the arrays with ones that hold `tokens` more tokens and belong to this state alone."""
        self._cache, self._length, self._shared = cache, self._length + tokens, 0

    def free(self) -> None:
        self._cache, self._length, self._shared = None, 0, 0


class PackedSession:
    """A contract `Session` over a function that runs a decoder graph once.

    Args:
        run: runs the graph on all its inputs, by name. Must not write to the returned arrays again.
        decoder: the graph's signature, or None for a graph without a cache (then only `run` works).
        limits: of a step and of a state.
        close: called once when the session is closed.
    """

    def __init__(
        self, run: Run, decoder: Decoder | None, limits: Limits, close: Callable[[], None] | None = None
    ) -> None:
        self._run, self._decoder, self._limits, self._close = run, decoder, limits, close
        self._closed = False

    @property
    def limits(self) -> Limits:
        return self._limits

    def pages(self) -> tuple[int, int]:
        return (0, 0)

    def new_state(self) -> PackedState:
        return PackedState(empty_cache(self._need_decoder()), 0)

    def step(self, work: Sequence[Work]) -> Sequence[Tensor | tuple[Tensor, Tensor] | None]:
        decoder = self._need_decoder()
        check_step(work, self._limits, decoder.vocabulary)
        results, added = self._compute(work, self._run)
        self._commit(work, added)
        return results

    def _compute(
        self, work: Sequence[Work], run: Run
    ) -> tuple[list[Tensor | tuple[Tensor, Tensor] | None], list[list[Array]]]:
        """The result of each work and the new cache of its state. Changes nothing."""
        decoder = self._need_decoder()
        if not work:
            return [], []
        states = [_packed(w.state) for w in work]
        counts, lengths = [len(w.tokens) for w in work], [s.length for s in states]
        rows = logit_rows(work, counts)
        cache = [np.concatenate(parts) for parts in zip(*(s.cache for s in states), strict=True)]
        outputs = run(decoder_inputs([w.tokens for w in work], rows, cache, lengths))
        logits = np.asarray(outputs["logits"])
        if logits.shape != (len(rows), decoder.vocabulary):
            raise RuntimeError(f"the engine returned logits {logits.shape}, not {(len(rows), decoder.vocabulary)}")
        results = split_logits(logits, work, counts)
        added: list[list[Array]] = [[] for _ in work]
        past = sum(lengths)
        for i in range(len(decoder.layers)):
            for part, name in enumerate(cache_output_names(i)):
                new = np.asarray(outputs[name])[past:]
                if new.shape != (sum(counts), states[0].cache[2 * i + part].shape[1]):
                    raise RuntimeError(f"the engine returned {name} with {new.shape[0]} new tokens of {sum(counts)}")
                at = 0
                for s, state in enumerate(states):
                    added[s].append(np.concatenate([state.cache[2 * i + part], new[at : at + counts[s]]]))
                    at += counts[s]
        return results, added

    @staticmethod
    def _commit(work: Sequence[Work], added: Sequence[list[Array]]) -> None:
        """Store the new caches in the states. Cannot fail."""
        for w, cache in zip(work, added, strict=True):
            _packed(w.state).append(cache, len(w.tokens))

    def run(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        self._need_open()
        return self._run(inputs)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            if self._close is not None:
                self._close()

    def _need_open(self) -> None:
        if self._closed:
            raise RuntimeError("this session is closed")

    def _need_decoder(self) -> Decoder:
        self._need_open()
        if self._decoder is None:
            raise RuntimeError("this graph has no cache; call run() with its inputs")
        return self._decoder


def _packed(state: State) -> PackedState:
    if not isinstance(state, PackedState):
        raise ValueError("this sequence state belongs to another session")
    state.cache  # noqa: B018  a freed state raises here, before anything runs
    return state
