"""Memory behind pages: the system gives it as pages are written to, and gets it back when they are dropped."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


class PageMemory:
    """Pages of one size, one behind the other.

    Args:
        pages: how many.
        size: bytes of a page.
    """

    def __init__(self, pages: int, size: int) -> None:
        self._map, self._size = mmap.mmap(-1, pages * size), size
        self.bytes: Array = np.frombuffer(self._map, np.uint8).reshape(pages, size)

    def drop(self, pages: Sequence[int]) -> None:
        """Give back what these pages alone lie in; they read as zeros then. Does nothing where the system takes
        nothing back (all but Linux)."""
        if not hasattr(mmap, "MADV_REMOVE"):
            return
        for first, end in runs(pages):
            begin = -(-first * self._size // mmap.PAGESIZE) * mmap.PAGESIZE
            length = end * self._size // mmap.PAGESIZE * mmap.PAGESIZE - begin
            if length > 0:
                self._map.madvise(mmap.MADV_REMOVE, begin, length)


def runs(pages: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Pages that follow each other, as (first, behind the last)."""
    first = end = -1
    for page in sorted(pages):
        if page != end:
            if end > first:
                yield first, end
            first = page
        end = page + 1
    if end > first:
        yield first, end
