"""Saves and restores states. Sessions on one card support it; sessions on several cards do not.

The pages of each layer are saved as in memory, including nodes. The queries that sparse attention remembers are not: a
restored state selects its columns from the next queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from transom.contract import State, Tensor
from transom.sessions import PagedState, saved_array
from transom.signature import Decoder
from transom_cuda_triton import cache
from transom_cuda_triton.engine import TritonEngine
from transom_cuda_triton.session import TritonSession


class SavingTritonSession(TritonSession):
    """A `TritonSession` that is also a `transom.contract_optional.SavingSession`."""

    def __init__(self, engine: TritonEngine, decoder: Decoder, *, context: int, pages: int) -> None:
        self._one = engine
        super().__init__(engine, decoder, context=context, pages=pages)

    def save(self, state: State) -> Mapping[str, Tensor]:
        """uint8 [pages, bytes] for each tensor of each layer: `layer.0.k`, …"""
        return cache.read_pages(self._one.caches, self._own(state).table.pages)

    def restore(self, length: int, arrays: Mapping[str, Tensor]) -> PagedState:
        """A state from the output of `save`.

        Raises:
            ValueError: the arrays do not fit a state of `length` tokens.
            OutOfPages: the pool is too small.
        """

        def write(state: PagedState, pages: Sequence[int]) -> None:
            sizes = cache.page_sizes(self._one.caches)
            given = {name: saved_array(arrays, name, np.uint8, (len(pages), size)) for name, size in sizes.items()}
            cache.write_pages(self._one.caches, pages, given)

        return self._restored(length, write)
