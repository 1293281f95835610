"""Memory of cache pages: committed as pages are written, released when they are dropped."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


class PageMemory:
    """Contiguous pages of one size.

    Args:
        pages: number of pages.
        size: bytes per page.
    """

    def __init__(self, pages: int, size: int) -> None:
        self._map, self._size = mmap.mmap(-1, pages * size), size
        self.bytes: Array = np.frombuffer(self._map, np.uint8).reshape(pages, size)

    def drop(self, pages: Sequence[int]) -> None:
        """Release the memory that only these pages occupy; they then read as zeros. Does nothing on systems other than
        Linux, which cannot release it."""
        if not hasattr(mmap, "MADV_REMOVE"):
            return
        for first, end in runs(pages):
            begin = -(-first * self._size // mmap.PAGESIZE) * mmap.PAGESIZE
            length = end * self._size // mmap.PAGESIZE * mmap.PAGESIZE - begin
            if length > 0:
                self._map.madvise(mmap.MADV_REMOVE, begin, length)


def runs(pages: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges of consecutive pages, as (first, end)."""
    first = end = -1
    for page in sorted(pages):
        if page != end:
            if end > first:
                yield first, end
            first = page
        end = page + 1
    if end > first:
        yield first, end
