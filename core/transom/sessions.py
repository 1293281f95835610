"""A contract session for graphs that carry their cache in inputs and outputs: the helper that makes a backend small.

A backend that can only run a graph once, tensors in and tensors out, gets sequence states, forks, ragged steps and
all-or-nothing failure from `PackedSession`. The cache of each sequence lives here, in host memory, in float32. Every
step copies the caches of the sequences in it, so a backend that owns its cache is faster; this is the plain form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from transom.contract import Limits, State, Tensor, Work
from transom.signature import Decoder, cache_input_names, cache_output_names

Array = np.ndarray[Any, np.dtype[Any]]
Run = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""Runs the graph once: arrays by input name -> arrays by output name."""


class PackedState:
    """The cache of one sequence: for each layer the keys and the values of its tokens, [tokens, heads * dim]."""

    def __init__(self, cache: list[Array], length: int, shared: int = 0) -> None:
        self._cache: list[Array] | None = cache
        self._length = length
        self._shared = shared  # leading tokens whose arrays the state forked from counts as its own

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
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot fork at {length}: the state holds {self.length} tokens")
        return PackedState([part[:length] for part in cache], length, length)  # arrays are never written to: shared

    def truncate(self, length: int) -> None:
        cache = self.cache
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate to {length}: the state holds {self.length} tokens")
        if self._shared < length < self.length:  # a copy, since a view would hold the memory of what was cut off
            self._cache, self._shared = [part[:length].copy() for part in cache], 0
        else:
            self._cache, self._shared = [part[:length] for part in cache], min(self._shared, length)
        self._length = length

    def append(self, cache: list[Array], tokens: int) -> None:
        """Take over arrays that hold `tokens` more tokens; they are this state's alone."""
        self._cache, self._length, self._shared = cache, self._length + tokens, 0

    def free(self) -> None:
        self._cache, self._length, self._shared = None, 0, 0


class PackedSession:
    """A contract `Session` over a function that runs a decoder graph once.

    Args:
        run: runs the graph; called with every input by name. Must return arrays that it does not write to again.
        decoder: the graph's signature, or None for a graph without a cache (then only `run` works).
        limits: what one step may hold.
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
        decoder = self._need_decoder()
        empty = [
            np.zeros((0, layer.kv_heads * dim), np.float32)
            for layer in decoder.layers
            for dim in (layer.head_dim, layer.value_dim)
        ]
        return PackedState(empty, 0)

    def step(self, work: Sequence[Work]) -> Sequence[Tensor | tuple[Tensor, Tensor] | None]:
        decoder = self._need_decoder()
        check_step(work, self._limits, decoder.vocabulary)
        results, added = self._compute(work, self._run)
        self._commit(work, added)
        return results

    def _compute(
        self, work: Sequence[Work], run: Run
    ) -> tuple[list[Tensor | tuple[Tensor, Tensor] | None], list[list[Array]]]:
        """What each work gets, and the cache that its state would have afterwards. Changes nothing."""
        decoder = self._need_decoder()
        if not work:
            return [], []
        states = [_packed(w.state) for w in work]
        counts, lengths = [len(w.tokens) for w in work], [s.length for s in states]
        rows = logit_rows(work, counts)
        ids = np.arange(len(work), dtype=np.int64)
        inputs: dict[str, Any] = {
            "input_ids": np.concatenate([np.asarray(w.tokens, np.int64) for w in work]),
            "positions": np.concatenate(
                [n + np.arange(c, dtype=np.int64) for n, c in zip(lengths, counts, strict=True)]
            ),
            "sequences": np.repeat(ids, counts),
            "past_positions": np.concatenate([np.arange(n, dtype=np.int64) for n in lengths]),
            "past_sequences": np.repeat(ids, lengths),
            "logit_rows": np.asarray(rows, np.int64),
        }
        for i in range(len(decoder.layers)):
            for part, name in enumerate(cache_input_names(i)):
                inputs[name] = np.concatenate([s.cache[2 * i + part] for s in states])
        outputs = run(inputs)
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
        """Give the states their new caches. Cannot fail."""
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


def check_step(work: Sequence[Work], limits: Limits, vocabulary: int, *, sparsity: bool = False) -> None:
    """The checks that every session owes its host before it changes anything.

    Args:
        sparsity: the session obeys `Work.sparsity`.

    Raises:
        ValueError: the step is beyond the limits, a state appears twice, a token id is outside the vocabulary, or a
            work names a sparsity policy that the session cannot obey.
    """
    if len(work) > limits.max_sequences:
        raise ValueError(f"{len(work)} sequences in one step; this session takes {limits.max_sequences}")
    if (total := sum(len(w.tokens) for w in work)) > limits.max_tokens:
        raise ValueError(f"{total} tokens in one step; this session takes {limits.max_tokens}")
    if len({id(w.state) for w in work}) != len(work):
        raise ValueError("one sequence state appears twice in a step")
    for w in work:
        if w.sparsity is not None and not sparsity:
            raise ValueError("this session reads its cache as it was loaded; it takes no sparsity policy for a step")
        if len(w.tokens) == 0:
            raise ValueError("a sequence in a step has no new tokens")
        if limits.token_classes and len(w.tokens) not in limits.token_classes:
            raise ValueError(f"{len(w.tokens)} new tokens; this session takes {limits.token_classes}")
        if w.state.length + len(w.tokens) > limits.context:
            raise ValueError(f"{w.state.length} + {len(w.tokens)} tokens exceed the context of {limits.context} tokens")
        if w.top_k < 0 or w.top_k > vocabulary:
            raise ValueError(f"top_k {w.top_k} is outside 0 … {vocabulary}")
        low, high = min(w.tokens), max(w.tokens)
        if low < 0 or high >= vocabulary:
            bad = low if low < 0 else high
            raise ValueError(f"token id {bad} is outside the vocabulary of {vocabulary}")


def best(logits: Array, count: int) -> tuple[Array, Array]:
    """The `count` largest of the last axis, best first, ties by lower id: (int64 ids, float32 values).

    A partial selection: sorting all of a large vocabulary takes longer than many a model's step. NaN counts as least.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    ids = np.empty((len(flat), count), np.int64)
    for row, out in zip(flat, ids, strict=True):
        out[:] = _best_of(row, count)
    ids = ids.reshape(*logits.shape[:-1], count)
    return ids, np.take_along_axis(logits, ids, -1).astype(np.float32)


def _best_of(row: Array, count: int) -> Array | int:
    if count == 1:
        top = int(np.argmax(row))
        if not np.isnan(row[top]):  # argmax finds the first NaN, if there is one
            return top
    least = np.partition(row, len(row) - count)[len(row) - count]
    candidates = np.flatnonzero(row >= least)
    if len(candidates) < count:  # NaN is no number to compare with: order all of it, NaN last
        candidates = np.arange(len(row))
    return candidates[np.argsort(-row[candidates], kind="stable")[:count]]


def logit_rows(work: Sequence[Work], counts: Sequence[int]) -> list[int]:
    """The places, among the packed tokens of a step, whose logits were asked for."""
    rows: list[int] = []
    start = 0
    for w, count in zip(work, counts, strict=True):
        first = {"none": count, "last": count - 1, "all": 0}[w.logits]
        rows += range(start + first, start + count)
        start += count
    return rows


def split_logits(
    logits: Array, work: Sequence[Work], counts: Sequence[int], *, copy: bool = True
) -> list[Tensor | tuple[Tensor, Tensor] | None]:
    """Rows of the step's logits, [rows, vocabulary], as each work asked for them.

    Args:
        copy: False where the caller gives the array away: the results then share it, though no row of it.
    """
    results: list[Tensor | tuple[Tensor, Tensor] | None] = []
    at = 0
    for w, count in zip(work, counts, strict=True):
        rows = {"none": 0, "last": 1, "all": count}[w.logits]
        part = logits[at : at + rows]
        at += rows
        if w.logits == "none":
            results.append(None)
            continue
        part = part[0] if w.logits == "last" else part
        if w.top_k:
            results.append(best(part, w.top_k))
        else:
            results.append(np.array(part, np.float32) if copy else part)
    return results


def _packed(state: State) -> PackedState:
    if not isinstance(state, PackedState):
        raise ValueError("this sequence state belongs to another session")
    state.cache  # noqa: B018  a freed state raises here, before anything runs
    return state
