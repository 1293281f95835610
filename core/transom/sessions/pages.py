"""The page allocator of the key-value cache: which sequence holds which page. It knows no engine and no tensor.

A page is a number; its arrays belong to the engine that computes attention. Forked sequences share pages, which are
counted by holder. Only a partly filled last page is ever written to while it is shared, so it is copied first (copy on
write). A step reserves the pages that it needs, runs, and then commits or rolls back.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transom.contract import OutOfPages
from transom.sessions.steps import need_within


class PagePool:
    """Allocates pages, lowest number first, so that used pages lie together.

    Args:
        total: pages in the pool.
        page_tokens: tokens in a page.
        dropped: called with the pages that no sequence holds any more, after a sequence released some.
    """

    def __init__(
        self, total: int, page_tokens: int, dropped: Callable[[Sequence[int]], None] = lambda pages: None
    ) -> None:
        if total < 1 or page_tokens < 1:
            raise ValueError("a pool needs at least one page of at least one token")
        self.total, self.page_tokens, self._dropped = total, page_tokens, dropped
        self._free = list(range(total))  # a heap already
        self._holders: dict[int, list[PageTable]] = {}

    @property
    def free(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free)

    def holders(self, page: int) -> int:
        """Sequences that hold the page."""
        return len(self._holders.get(page, ()))

    def new_table(self) -> PageTable:
        return PageTable(self)

    def reserve(self, work: Sequence[tuple[PageTable, int]]) -> Reservation:
        """Reserve pages for the new tokens of each sequence. The sequences do not change before `commit`.

        Raises:
            OutOfPages: the pool is too small; nothing was taken.
            RuntimeError: a sequence was freed.
        """
        plans: list[tuple[PageTable, int, bool, int]] = []
        needed = 0
        for table, tokens in work:
            pages = table.pages
            length = table.length + tokens
            missing = -(-length // self.page_tokens) - len(pages)
            copies = table.length % self.page_tokens != 0 and self.holders(pages[-1]) > 1
            plans.append((table, length, copies, missing))
            needed += missing + copies
        if needed > len(self._free):
            raise OutOfPages(f"this step needs {needed} cache pages and {len(self._free)} of {self.total} are free")
        lists: list[list[int]] = []
        copied: list[tuple[int, int]] = []
        for table, _, copies, missing in plans:
            pages = list(table.pages)
            if copies:
                fresh = heapq.heappop(self._free)
                copied.append((pages[-1], fresh))
                pages[-1] = fresh
            pages += [heapq.heappop(self._free) for _ in range(missing)]
            lists.append(pages)
        lengths = [length for _, length, _, _ in plans]
        return Reservation(self, [t for t, *_ in plans], lists, lengths, copied)

    def _hold(self, page: int, table: PageTable) -> None:
        self._holders.setdefault(page, []).append(table)

    def _release(self, page: int, table: PageTable) -> None:
        holders = self._holders[page]
        holders.remove(table)
        if not holders:
            del self._holders[page]
            heapq.heappush(self._free, page)

    def _release_all(self, pages: Sequence[int], table: PageTable) -> None:
        for page in pages:
            self._release(page, table)
        if freed := [page for page in pages if page not in self._holders]:
            self._dropped(freed)

    def _put_back(self, pages: Sequence[int]) -> None:
        for page in pages:
            heapq.heappush(self._free, page)
        if pages:
            self._dropped(pages)


class PageTable:
    """The pages of one sequence, in order, and the number of its tokens."""

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self._pages: list[int] | None = []
        self._length = 0

    @property
    def pages(self) -> list[int]:
        """Raises RuntimeError when the sequence was freed."""
        if self._pages is None:
            raise RuntimeError("this sequence state was freed")
        return self._pages

    @property
    def length(self) -> int:
        return self._length

    @property
    def owned(self) -> int:
        """Pages that this sequence accounts for: a shared page counts for the first of its holders only."""
        return sum(self.pool._holders[page][0] is self for page in self._pages or ())

    def fork(self, length: int) -> PageTable:
        """A new sequence that shares the pages of the first `length` tokens.

        Raises:
            ValueError: `length` is not within 0 … `self.length`.
            RuntimeError: the sequence was freed.
        """
        pages = self._first(length, "fork")
        forked = PageTable(self.pool)
        forked._pages, forked._length = list(pages), length
        for page in pages:
            self.pool._hold(page, forked)
        return forked

    def truncate(self, length: int) -> None:
        """Drop all but the first `length` tokens and release the pages behind them. Raises as `fork` does."""
        kept = self._first(length, "truncate")
        rest = self.pages[len(kept) :]
        self._pages, self._length = list(kept), length
        self.pool._release_all(rest, self)

    def free(self) -> None:
        """Release all pages. A second call does nothing."""
        rest = self._pages or []
        self._pages, self._length = None, 0
        self.pool._release_all(rest, self)

    def _first(self, length: int, what: str) -> list[int]:
        pages = self.pages
        need_within(length, self._length, what)
        return pages[: -(-length // self.pool.page_tokens)]


@dataclass(frozen=True)
class Reservation:
    """The pages that one step may write to. Exactly one of `commit` and `rollback` is called, once."""

    pool: PagePool
    tables: list[PageTable]
    pages: list[list[int]]
    """For each sequence, its pages during the step and after it."""
    lengths: list[int]
    """For each sequence, its tokens after the step."""
    copies: list[tuple[int, int]]
    """(from, to): pages to copy before the step runs."""

    def commit(self) -> None:
        """The step has run: the sequences now hold these pages and tokens."""
        for table, pages, length in zip(self.tables, self.pages, self.lengths, strict=True):
            before = table.pages
            for old, new in zip(before, pages, strict=False):
                if old != new:
                    self.pool._release(old, table)
                    self.pool._hold(new, table)
            for page in pages[len(before) :]:
                self.pool._hold(page, table)
            table._pages, table._length = pages, length

    def rollback(self) -> None:
        """The step has failed: the new pages are released, the sequences are unchanged."""
        for table, pages in zip(self.tables, self.pages, strict=True):
            before = set(table.pages)
            self.pool._put_back([page for page in pages if page not in before])
