"""Saves and restores states. Sessions on one card support it; sessions on several cards do not.

The pages of each layer are saved as in memory, including nodes. The queries that sparse attention remembers are not: a
restored state selects its columns from the next queries.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from transom.contract import State, Tensor
from transom.sessions.steps import Array
from transom.signature import Decoder
from transom_cuda_triton import cache
from transom_cuda_triton.engine import TritonEngine
from transom_cuda_triton.session import TritonSession, TritonState


class SavingTritonSession(TritonSession):
    """A `TritonSession` that is also a `transom.contract_optional.SavingSession`."""

    def __init__(self, engine: TritonEngine, decoder: Decoder, *, context: int, pages: int) -> None:
        self._one = engine
        super().__init__(engine, decoder, context=context, pages=pages)

    def save(self, state: State) -> Mapping[str, Tensor]:
        """uint8 [pages, bytes] for each tensor of each layer: `layer.0.k`, …"""
        if not isinstance(state, TritonState) or state.table.pool is not self._pool:
            raise ValueError("this sequence state belongs to another session")
        return cache.read_pages(self._one.caches, state.table.pages)

    def restore(self, length: int, arrays: Mapping[str, Tensor]) -> TritonState:
        """A state from the output of `save`.

        Raises:
            ValueError: the arrays do not fit a state of `length` tokens.
            OutOfPages: the pool is too small.
        """
        self._need_open()
        count = -(-length // self._one.page_tokens)
        sizes = cache.page_sizes(self._one.caches)
        given: dict[str, Array] = {name: np.asarray(arrays.get(name, ())) for name in sizes}
        for name, size in sizes.items():
            if given[name].dtype != np.uint8 or given[name].shape != (count, size):
                raise ValueError(f"{name} has no pages for {length} tokens")
        if not 0 <= length <= self._limits.context:
            raise ValueError(f"{length} tokens exceed the context of {self._limits.context} tokens")
        state = self.new_state()
        reservation = self._pool.reserve([(state.table, length)])
        try:
            cache.write_pages(self._one.caches, reservation.pages[0], given)
        except BaseException:
            reservation.rollback()
            raise
        reservation.commit()
        return state
