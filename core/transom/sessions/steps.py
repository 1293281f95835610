"""Parts of a step that every session needs: the checks before it, and the rows of logits after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from transom.contract import Limits, Tensor, Work

Array = np.ndarray[Any, np.dtype[Any]]
T = TypeVar("T")

BLOCK = 64
"""Queries that select keys together in a chunk."""
CHUNK = 16
"""Minimum number of new tokens for a chunk."""


def check_step(work: Sequence[Work], limits: Limits, vocabulary: int, *, sparsity: bool = False) -> None:
    """The checks that every session makes before it changes anything.

    Args:
        sparsity: whether the session supports `Work.sparsity`.

    Raises:
        ValueError: the step exceeds the limits, a state appears twice, a token id is outside the vocabulary, or a
            work has a sparsity policy and the session supports none.
    """
    if len(work) > limits.max_sequences:
        raise ValueError(f"{len(work)} sequences in one step; this session takes {limits.max_sequences}")
    if (total := sum(len(w.tokens) for w in work)) > limits.max_tokens:
        raise ValueError(f"{total} tokens in one step; this session takes {limits.max_tokens}")
    if len({id(w.state) for w in work}) != len(work):
        raise ValueError("one sequence state appears twice in a step")
    for w in work:
        if w.sparsity is not None and not sparsity:
            raise ValueError("this session takes no sparsity policy for a step; it is fixed at load time")
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


def need_within(length: int, held: int, what: str) -> None:
    """Raise ValueError if a state that holds `held` tokens cannot be forked or truncated at `length`."""
    if not 0 <= length <= held:
        raise ValueError(f"cannot {what} at {length}: the state holds {held} tokens")


def best(logits: Array, count: int) -> tuple[Array, Array]:
    """The `count` largest of the last axis, best first, NaN last, ties by lower id: (int64 ids, float32 values)."""
    flat = logits.reshape(-1, logits.shape[-1])
    ids = np.empty((len(flat), count), np.int64)
    for row, out in zip(flat, ids, strict=True):
        out[:] = top_k(row, count)
    ids = ids.reshape(*logits.shape[:-1], count)
    return ids, np.take_along_axis(logits, ids, -1).astype(np.float32)


def top_k(row: Array, count: int) -> Array:
    """The ids of the `count` largest values of a vector, best first, ties by lower id; int64. NaN sorts last.

    A partial selection, since sorting a large vocabulary takes longer than a step of many models.
    """
    if count == 1 and not np.isnan(row[top := int(np.argmax(row))]):  # argmax returns the first NaN, if any
        return np.array([top], np.int64)
    maxima, groups = row, len(row)
    rows = len(row) // max(4 * count, 256)
    if rows >= 4:
        # Maxima of `groups` interleaved groups: k groups hold a value at least as large as the k-th of these maxima.
        groups = len(row) // rows
        maxima = row[: rows * groups].reshape(rows, groups).max(axis=0)
    ids = np.flatnonzero(row >= np.partition(maxima, groups - count)[groups - count])
    if len(ids) < count:  # NaN fails every comparison: sort everything, NaN last
        ids = np.arange(len(row))
    return ids[np.argsort(-row[ids], kind="stable")[:count]].astype(np.int64, copy=False)


def logit_rows(work: Sequence[Work], counts: Sequence[int]) -> list[int]:
    """Indices of the tokens that need logits, among the packed tokens of a step."""
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
    """Splits the step's logits, [rows, vocabulary], into the result that each work requested.

    Args:
        copy: False if the caller does not use the array again: the results are then views of it, no row in two.
    """

    def result(part: Array, top_k: int) -> Tensor | tuple[Tensor, Tensor]:
        if top_k:
            return best(part, top_k)
        return np.array(part, np.float32) if copy else part

    return split_rows(logits, work, counts, result)


def split_rows(
    logits: Any, work: Sequence[Work], counts: Sequence[int], result: Callable[[Any, int], T]
) -> list[T | None]:
    """Splits the step's logits among the works, for arrays of any library: `split_logits` is for NumPy's.

    Args:
        logits: [rows, vocabulary], for example a tensor in device memory.
        result: makes the result of a work from its rows, [count, vocabulary] or for `"last"` [vocabulary], and from
            its `top_k`.
    """
    results: list[T | None] = []
    at = 0
    for w, count in zip(work, counts, strict=True):
        rows = {"none": 0, "last": 1, "all": count}[w.logits]
        part = logits[at : at + rows]
        at += rows
        results.append(None if w.logits == "none" else result(part[0] if w.logits == "last" else part, w.top_k))
    return results


def dense_keys(past: int, count: int, window: int, *, chunk: bool) -> int:
    """Keys that `count` new tokens attend to; in a chunk, all tokens of a block count the keys of the whole block."""
    total, position = 0, past
    while position < past + count:
        end = min((position // BLOCK + 1) * BLOCK, past + count) if chunk else position + 1
        start = max(0, position - window + 1) if window else 0
        total += (end - start) * (end - position)
        position = end
    return total
