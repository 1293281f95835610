"""A contract session whose key-value cache lives in pages that we own; attention over them is the engine's."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from transom.contract import Limits, Tensor, Work
from transom.errors import EngineError
from transom.sessions import check_step, logit_rows, split_logits
from transom_openvino_cpu import names
from transom_openvino_cpu.engine import Engine
from transom_openvino_cpu.pages import PagePool, PageTable
from transom_openvino_cpu.plan import Plan

Array = np.ndarray[Any, np.dtype[Any]]

MAX_SEQUENCES = 256
MAX_TOKENS = 1024
"""New tokens in one step. Longer chunks are not faster here, and their activations take memory."""
_CONTAINERS: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.float32}


class PageArrays:
    """The memory behind the pages of every layer: reserved at once, taken from the system as pages are written to."""

    def __init__(self, plan: Plan, pages: int, element_bytes: int) -> None:
        assert plan.decoder is not None
        self.arrays: dict[str, Array] = {}
        container = np.dtype(_CONTAINERS[element_bytes])
        for i, layer in enumerate(plan.decoder.layers):
            for name, dim in zip(names.cache_inputs(i), (layer.head_dim, layer.value_dim), strict=True):
                shape = (pages, layer.kv_heads, names.PAGE_TOKENS, dim)
                memory = mmap.mmap(-1, int(np.prod(shape)) * container.itemsize)
                self.arrays[name] = np.frombuffer(memory, container).reshape(shape)

    def copy(self, source: int, target: int) -> None:
        for array in self.arrays.values():
            array[target] = array[source]


class PagedState:
    """The cache of one sequence, as the contract wants it."""

    def __init__(self, table: PageTable, page_bytes: int) -> None:
        self.table, self._page_bytes = table, page_bytes

    @property
    def length(self) -> int:
        return self.table.length

    @property
    def nbytes(self) -> int:
        return self.table.owned * self._page_bytes

    def fork(self, length: int) -> PagedState:
        return PagedState(self.table.fork(length), self._page_bytes)

    def truncate(self, length: int) -> None:
        self.table.truncate(length)

    def free(self) -> None:
        self.table.free()


class PagedSession:
    """Ragged steps over a paged cache.

    Args:
        context: tokens one state may hold.
        pages: pages in the pool, for all sequences together.
    """

    def __init__(self, engine: Engine, plan: Plan, *, context: int, pages: int) -> None:
        assert plan.decoder is not None
        self._engine, self._decoder = engine, plan.decoder
        element_bytes = engine.cache_element_bytes()
        self._page_bytes = self._decoder.cache_bytes(names.PAGE_TOKENS, element_bytes)
        self._pool = PagePool(pages, names.PAGE_TOKENS)
        self._scratch = pages  # one page more, which nobody holds: padding writes to it
        self._arrays = PageArrays(plan, pages + 1, element_bytes)
        self._limits = Limits(MAX_SEQUENCES, MAX_TOKENS, context, names.PAGE_TOKENS)
        self._closed = False
        engine.bind_caches(self._arrays.arrays)
        self._failed: EngineError | None = None
        self._warming = threading.Thread(target=self._warm_up, name="transom-openvino-warm-up")
        self._warming.start()

    def _warm_up(self) -> None:
        """One token that nobody sees: the engine repacks its weights while the host does other things."""
        try:
            self._engine.run(self._arguments([np.zeros(1, np.int64)], [0], [[self._scratch]], [0]), (), keep=True)
        except EngineError as e:
            self._failed = e  # raised by the first step
        self._engine.drop_read_pages()

    @property
    def limits(self) -> Limits:
        return self._limits

    def pages(self) -> tuple[int, int]:
        return (self._pool.total, self._pool.free)

    def new_state(self) -> PagedState:
        self._need_open()
        return PagedState(self._pool.new_table(), self._page_bytes)

    def step(self, work: Sequence[Work]) -> Sequence[Tensor | tuple[Tensor, Tensor] | None]:
        self._need_open()
        states = [self._own(w) for w in work]
        check_step(work, self._limits, self._decoder.vocabulary)
        if not work:
            return []
        self._warming.join()
        if self._failed is not None:
            raise self._failed
        tokens = [np.asarray(w.tokens, np.int64) for w in work]
        counts = [len(t) for t in tokens]
        rows = logit_rows(work, counts)
        past = [state.length for state in states]
        reservation = self._pool.reserve([(s.table, n) for s, n in zip(states, counts, strict=True)])
        try:
            for source, target in reservation.copies:
                self._arrays.copy(source, target)
            outputs = self._engine.run(self._arguments(tokens, past, reservation.pages, rows), ("logits",), keep=True)
            results = split_logits(outputs["logits"], work, counts, copy=False)
        except BaseException:  # whatever it is, KeyboardInterrupt too, the states stay as they were
            reservation.rollback()
            raise
        reservation.commit()
        return results

    def _own(self, work: Work) -> PagedState:
        state = work.state
        if not isinstance(state, PagedState) or state.table.pool is not self._pool:
            raise ValueError("this sequence state belongs to another session")
        state.table.pages  # noqa: B018  a freed state raises here, before anything runs
        return state

    def _arguments(
        self, tokens: Sequence[Array], past: Sequence[int], pages: Sequence[Sequence[int]], rows: Sequence[int]
    ) -> dict[str, Array]:
        """The inputs of a step, padded by a sequence of its own to one of few token counts: see `padded`."""
        counts = [len(t) for t in tokens]
        total = sum(counts)
        if padding := padded(total) - total:
            tokens, past = [*tokens, np.zeros(padding, np.int64)], [*past, 0]
            pages, counts = [*pages, [self._scratch]], [*counts, padding]
        return {
            "input_ids": np.concatenate(tokens),
            "positions": np.concatenate([p + np.arange(n, dtype=np.int64) for p, n in zip(past, counts, strict=True)]),
            "logit_rows": np.array([*rows, *[0] * (padded(len(rows)) - len(rows))], np.int64),
            names.PAST_LENGTHS: np.array(past, np.int32),
            names.BEGINS: _begins(counts),
            names.PAGES: np.concatenate([np.asarray(p, np.int32) for p in pages]),
            names.PAGE_BEGINS: _begins([len(p) for p in pages]),
            names.LONGEST: np.array(max(p + n for p, n in zip(past, counts, strict=True)), np.int32),
        }

    def run(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        self._need_open()
        raise RuntimeError("this session keeps the cache of its decoder itself; call step()")

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._warming.join()
            self._engine.close()

    def _need_open(self) -> None:
        if self._closed:
            raise RuntimeError("this session is closed")


def _begins(counts: Sequence[int]) -> Array:
    """Where each part starts, and where the last ends: int32 [parts + 1]."""
    return np.array(list(accumulate(counts, initial=0)), np.int32)


def padded(count: int) -> int:
    """The size that `count` tokens (or rows of logits) are padded to: few enough sizes in all.

    The engine keeps code and buffers for each size it meets, about 1 MB, and never gives them back.
    """
    step = 1 if count <= 16 else 8 if count <= 128 else names.PAGE_TOKENS
    return -(-count // step) * step
