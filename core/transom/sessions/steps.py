"""What every session does around a step: the checks that it owes its host, and sorting out the rows of logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from transom.contract import Limits, Tensor, Work

Array = np.ndarray[Any, np.dtype[Any]]

BLOCK = 64
"""Queries that choose together."""
CHUNK = 16
"""New tokens from which on they do."""


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


def need_within(length: int, held: int, what: str) -> None:
    """Raise ValueError where a state that holds so many tokens cannot be forked or cut at a length."""
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
    """The ids of the `count` largest values of a vector, best first, ties by lower id; int64. NaN counts as least.

    A partial selection: sorting all of a large vocabulary takes longer than many a model's step.
    """
    if count == 1 and not np.isnan(row[top := int(np.argmax(row))]):  # argmax finds the first NaN, if there is one
        return np.array([top], np.int64)
    maxima, groups = row, len(row)
    rows = len(row) // max(4 * count, 256)
    if rows >= 4:
        # Maxima of `groups` interleaved groups: k groups hold a value at least as large as the k-th of these maxima.
        groups = len(row) // rows
        maxima = row[: rows * groups].reshape(rows, groups).max(axis=0)
    ids = np.flatnonzero(row >= np.partition(maxima, groups - count)[groups - count])
    if len(ids) < count:  # nothing compares with NaN: order all of it, NaN last
        ids = np.arange(len(row))
    return ids[np.argsort(-row[ids], kind="stable")[:count]].astype(np.int64, copy=False)


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


def dense_keys(past: int, count: int, window: int, *, chunk: bool) -> int:
    """Keys that `count` new tokens see; those of a block that would choose together in a chunk count alike."""
    total, position = 0, past
    while position < past + count:
        end = min((position // BLOCK + 1) * BLOCK, past + count) if chunk else position + 1
        start = max(0, position - window + 1) if window else 0
        total += (end - start) * (end - position)
        position = end
    return total
