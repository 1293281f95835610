"""The paged session over the native engine, with sparsity policies and counts of the keys read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from transom.contract import State, Tensor, Work
from transom.sessions import PagedSession, PagedState, check_step, saved_array
from transom.sessions.pages import PageTable
from transom.sessions.steps import CHUNK, Array, dense_keys
from transom.signature import Decoder
from transom_openvino_cpu.native.engine import NativeEngine


class SparseState(PagedState):
    """A state with the route that sparse attention keeps for a sequence, created when it is first needed."""

    def __init__(self, table: PageTable, page_bytes: int, engine: NativeEngine) -> None:
        super().__init__(table, page_bytes)
        self._engine = engine
        self.route = 0
        self._counts: Array | None = None
        self._dense: list[tuple[int, int, bool]] = []
        """Steps without a route: cached tokens, new tokens, whether the step was a chunk."""

    def need_route(self) -> int:
        if not self.route:
            self.route = self._engine.new_route()
        return self.route

    def ran_dense(self, past: int, count: int) -> None:
        """Record a step without a route. Consecutive decoding steps share one entry."""
        chunk = count >= CHUNK
        if self._dense and not chunk:
            before, tokens, was_chunk = self._dense[-1]
            if not was_chunk and before + tokens == past:
                self._dense[-1] = (before, tokens + count, False)
                return
        self._dense.append((past, count, chunk))

    def keys_read(self) -> Array:
        layers = self._engine.program.layers
        if self._counts is None:
            self._counts = np.zeros((2, len(layers), max(layer.kv_heads for layer in layers)))
        if self.route:
            self._counts += self._engine.take_counts(self.route)
        for past, count, chunk in self._dense:
            for i, layer in enumerate(layers):
                self._counts[:, i, : layer.kv_heads] += dense_keys(past, count, layer.window, chunk=chunk)
        self._dense.clear()
        return self._counts.copy()

    def fork(self, length: int) -> SparseState:
        forked = SparseState(self.table.fork(length), self._page_bytes, self._engine)
        if self.route:
            forked.route = self._engine.copy_route(self.route)
        return forked

    def free(self) -> None:
        super().free()
        self._free_route()

    def _free_route(self) -> None:
        if self.route:
            self._engine.free_route(self.route)
            self.route = 0

    def __del__(self) -> None:
        self._free_route()


class NativeSession(PagedSession):
    """A `SparseSession` and `SavingSession` of `transom.contract_optional`."""

    def __init__(self, engine: NativeEngine, decoder: Decoder, *, context: int, pages: int) -> None:
        self._native = engine
        super().__init__(engine, decoder, context=context, pages=pages, batch_invariant=True)

    def new_state(self) -> SparseState:
        self._need_open()
        return SparseState(self._pool.new_table(), self._page_bytes, self._native)

    def keys_read(self, state: State) -> Tensor:
        """float64 [2, layers, kv_heads]; see `transom.contract_optional.SparseSession`."""
        return self._sparse(state).keys_read()

    def save(self, state: State) -> Mapping[str, Tensor]:
        """Pages of each layer, uint8 [pages, bytes], and the route of sparse attention if there is one."""
        own = self._sparse(state)
        pages = own.table.pages
        found = {f"layer.{i}": self._native.page_data(i, pages) for i in range(len(self._native.program.layers))}
        if own.route:
            found["route"] = self._native.route_data(own.route).copy()
        return found

    def restore(self, length: int, arrays: Mapping[str, Tensor]) -> PagedState:
        """A state from the output of `save`.

        Raises:
            ValueError: the arrays do not fit a state of `length` tokens.
            OutOfPages: the pool is too small.
        """
        native = self._native

        def write(state: PagedState, pages: Sequence[int]) -> None:
            layers = [
                saved_array(arrays, f"layer.{i}", np.uint8, (len(pages), native.layer_page_bytes(i)))
                for i in range(len(native.program.layers))
            ]
            if "route" in arrays:
                route = self._sparse(state).need_route()
                memory = native.route_data(route)
                memory[:] = saved_array(arrays, "route", np.uint8, memory.shape)
                if not native.route_fits(route, length):
                    raise ValueError("the saved route of sparse attention is damaged")
                native.take_counts(route)
            for i, data in enumerate(layers):
                native.set_page_data(i, pages, data)

        return self._restored(length, write)

    def _sparse(self, state: State) -> SparseState:
        own = self._own(state)
        assert isinstance(own, SparseState)
        return own

    def _check(self, work: Sequence[Work]) -> None:
        check_step(work, self._limits, self._decoder.vocabulary, sparsity=True)
        for w in work:
            self._native.policy(self._text(w))  # raises ValueError for an unsupported policy

    def _text(self, work: Work) -> str:
        return self._native.program.sparsity if work.sparsity is None else work.sparsity

    def _compute(
        self,
        work: Sequence[Work],
        tokens: Sequence[Array],
        past: Sequence[int],
        pages: Sequence[Sequence[int]],
        rows: Sequence[int],
    ) -> Array:
        policies = [self._native.policy(self._text(w)) for w in work]
        states = [w.state for w in work]
        routes = []
        for state, policy in zip(states, policies, strict=True):
            assert isinstance(state, SparseState)
            routes.append(state.route if policy is None else state.need_route())
        logits = self._native.step(tokens, past, pages, rows, policies, routes)
        for state, route, old, new in zip(states, routes, past, tokens, strict=True):
            if not route:
                assert isinstance(state, SparseState)
                state.ran_dense(old, len(new))
        return logits
