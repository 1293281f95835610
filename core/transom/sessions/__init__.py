"""Helpers that keep a backend's session small.

`PackedSession` is for an engine that only runs a graph, tensors in and tensors out. `BufferedSession` is for one that
writes the cache of a sequence into arrays in place. `PagedSession` is for one that computes over a paged cache of its
own. `check_step`, `logit_rows`, `split_logits` (`split_rows` for arrays of other libraries) and `best` are the parts of
a step that every session needs.
"""

from __future__ import annotations

from transom.sessions.buffered import BufferedEngine, BufferedSession, BufferedState
from transom.sessions.packed import PackedSession, PackedState
from transom.sessions.paged import PagedEngine, PagedSession, PagedState, saved_array
from transom.sessions.pages import PagePool, PageTable
from transom.sessions.steps import best, check_step, logit_rows, split_logits, split_rows

__all__ = [
    "BufferedEngine",
    "BufferedSession",
    "BufferedState",
    "PackedSession",
    "PackedState",
    "PagePool",
    "PageTable",
    "PagedEngine",
    "PagedSession",
    "PagedState",
    "best",
    "check_step",
    "logit_rows",
    "saved_array",
    "split_logits",
    "split_rows",
]
