"""A contract session with a paged key-value cache: it allocates pages, and a paged engine computes over them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from transom.contract import Limits, State, Tensor, Work
from transom.errors import EngineError
from transom.sessions.pages import PagePool, PageTable
from transom.sessions.steps import Array, check_step, logit_rows, split_logits
from transom.signature import Decoder

MAX_SEQUENCES = 256
MAX_TOKENS = 1024
"""New tokens in one step. Longer chunks are hardly faster, and their activations take memory."""


class PagedEngine(Protocol):
    """Computes a decoder over pages in its memory; which sequence holds a page is the session's concern."""

    @property
    def page_tokens(self) -> int:
        """Tokens in a page."""

    def page_bytes(self) -> int:
        """Bytes of a page over all layers."""

    def bind_pages(self, pages: int) -> None:
        """Reserve memory for `pages` pages. Called once, before anything runs."""

    def copy_page(self, source: int, target: int) -> None: ...

    def drop_pages(self, pages: Sequence[int]) -> None:
        """No sequence holds these pages: their memory may be released. Does nothing once the engine is closed."""

    def warm_up(self) -> None:
        """Do what makes the first step as fast as later ones. May run in parallel with other work of the host."""

    def step(
        self, tokens: Sequence[Array], past: Sequence[int], pages: Sequence[Sequence[int]], rows: Sequence[int]
    ) -> Any:
        """Run the new tokens of some sequences.

        Args:
            tokens: new token ids of each sequence, int64 [new].
            past: cached tokens of each sequence.
            pages: pages of each sequence, including those for the new tokens.
            rows: indices of the tokens that need logits, among the new tokens of all sequences.

        Returns:
            float32 [rows or more, vocabulary], owned by the caller; another type if the session overrides `_results`.
        """

    def close(self) -> None: ...


class PagedState:
    """The cache of one sequence: a `State` of the contract."""

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

    A session that is also a `transom.contract_optional.SavingSession` implements `save` with `_own`, and `restore` with
    `saved_array` and `_restored`.

    Args:
        context: maximum tokens of one state.
        pages: pages in the pool, for all sequences together.
        max_sequences, max_tokens: maximum sequences and new tokens of one step.
        batch_invariant: as `transom.contract.Limits.batch_invariant`.
    """

    def __init__(
        self,
        engine: PagedEngine,
        decoder: Decoder,
        *,
        context: int,
        pages: int,
        max_sequences: int = MAX_SEQUENCES,
        max_tokens: int = MAX_TOKENS,
        batch_invariant: bool = False,
    ) -> None:
        self._engine, self._decoder = engine, decoder
        self._page_bytes = engine.page_bytes()
        self._pool = PagePool(pages, engine.page_tokens, engine.drop_pages)
        self._limits = Limits(max_sequences, max_tokens, context, engine.page_tokens, batch_invariant=batch_invariant)
        self._closed = False
        engine.bind_pages(pages)
        self._failed: EngineError | None = None
        self._warming = threading.Thread(target=self._warm_up, name="transom-warm-up")
        self._warming.start()

    def _warm_up(self) -> None:
        try:
            self._engine.warm_up()
        except EngineError as e:
            self._failed = e  # raised by the first step

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
        states = [self._own(w.state) for w in work]
        self._check(work)
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
                self._engine.copy_page(source, target)
            results = self._results(work, tokens, past, reservation.pages, rows)
        except BaseException:  # after any exception, KeyboardInterrupt too, the states are unchanged
            reservation.rollback()
            raise
        reservation.commit()
        return results

    def _check(self, work: Sequence[Work]) -> None:
        check_step(work, self._limits, self._decoder.vocabulary)

    def _results(
        self,
        work: Sequence[Work],
        tokens: Sequence[Array],
        past: Sequence[int],
        pages: Sequence[Sequence[int]],
        rows: Sequence[int],
    ) -> Sequence[Tensor | tuple[Tensor, Tensor] | None]:
        """The result of each work. A session whose logits are not in host memory overrides this."""
        logits = self._compute(work, tokens, past, pages, rows)
        return split_logits(logits, work, [len(t) for t in tokens], copy=False)

    def _compute(
        self,
        work: Sequence[Work],
        tokens: Sequence[Array],
        past: Sequence[int],
        pages: Sequence[Sequence[int]],
        rows: Sequence[int],
    ) -> Array:
        logits: Array = self._engine.step(tokens, past, pages, rows)
        return logits

    def _own(self, state: State) -> PagedState:
        """A state of this session. Raises ValueError for one of another session, RuntimeError for a freed one."""
        if not isinstance(state, PagedState) or state.table.pool is not self._pool:
            raise ValueError("this sequence state belongs to another session")
        state.table.pages  # noqa: B018  a freed state raises here, before anything runs
        return state

    def _restored(self, length: int, write: Callable[[PagedState, Sequence[int]], None]) -> PagedState:
        """A new state of `length` tokens; `write(state, pages)` fills its pages. If `write` raises, nothing stays
        reserved.

        Raises:
            ValueError: the state would exceed the context.
            OutOfPages: the pool is too small.
        """
        self._need_open()
        if not 0 <= length <= self._limits.context:
            raise ValueError(f"{length} tokens exceed the context of {self._limits.context} tokens")
        state = self.new_state()
        try:
            reservation = self._pool.reserve([(state.table, length)])
            try:
                write(state, reservation.pages[0])
            except BaseException:
                reservation.rollback()
                raise
        except BaseException:
            state.free()
            raise
        reservation.commit()
        return state

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


def saved_array(arrays: Mapping[str, Tensor], name: str, dtype: Any, shape: Sequence[int]) -> Array:
    """One of the arrays that `restore` received. Raises ValueError if it is missing, or has another dtype or shape."""
    array = np.asarray(arrays.get(name, ()))
    if array.dtype != dtype or array.shape != tuple(shape):
        raise ValueError(f"{name} does not fit a state of this length: {array.dtype} {list(array.shape)}")
    return array
