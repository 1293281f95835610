"""The page allocator: numbers only, no engine.

Draws: what is compared must be equal, whatever the numbers are.
"""

from __future__ import annotations

import numpy as np
import pytest

from transom.contract import OutOfPages
from transom.sessions import PagePool, PageTable


def grow(pool: PagePool, table: PageTable, tokens: int) -> list[tuple[int, int]]:
    reservation = pool.reserve([(table, tokens)])
    reservation.commit()
    return reservation.copies


def test_a_sequence_takes_pages_as_it_grows() -> None:
    pool = PagePool(4, 32)
    table = pool.new_table()
    grow(pool, table, 32)
    assert (len(table.pages), pool.free) == (1, 3)
    grow(pool, table, 1)
    assert (len(table.pages), pool.free, table.length) == (2, 2, 33)


def test_freed_pages_are_handed_out_again_lowest_first() -> None:
    pool = PagePool(4, 8)
    first, second = pool.new_table(), pool.new_table()
    grow(pool, first, 16)
    grow(pool, second, 8)
    first.free()
    third = pool.new_table()
    grow(pool, third, 8)
    assert third.pages == [0]


def test_a_fork_shares_pages_and_copies_the_partial_one_when_it_writes() -> None:
    pool = PagePool(8, 8)
    table = pool.new_table()
    grow(pool, table, 12)
    twin = table.fork(12)
    assert twin.pages == table.pages
    assert pool.free == 6
    copies = grow(pool, twin, 1)
    assert copies == [(table.pages[1], twin.pages[1])]
    assert twin.pages[0] == table.pages[0]
    assert grow(pool, table, 1) == []  # it is alone on that page now


def test_a_full_last_page_is_never_copied() -> None:
    pool = PagePool(8, 8)
    table = pool.new_table()
    grow(pool, table, 16)
    twin = table.fork(8)
    assert grow(pool, twin, 1) == []
    assert grow(pool, table, 1) == []


def test_each_page_counts_in_one_state_that_lives() -> None:
    pool = PagePool(8, 8)
    table = pool.new_table()
    grow(pool, table, 20)
    twin = table.fork(20)
    assert (table.owned, twin.owned) == (3, 0)
    table.free()
    assert (table.owned, twin.owned) == (0, 3)


def test_truncating_gives_whole_pages_back() -> None:
    pool = PagePool(8, 8)
    table = pool.new_table()
    grow(pool, table, 20)
    table.truncate(9)
    assert (len(table.pages), pool.free, table.length) == (2, 6, 9)
    table.truncate(0)
    assert pool.free == 8


def test_a_reservation_that_does_not_fit_takes_nothing() -> None:
    pool = PagePool(2, 8)
    first, second = pool.new_table(), pool.new_table()
    grow(pool, first, 8)
    with pytest.raises(OutOfPages, match="needs 2 cache pages and 1 of 2 are free"):
        pool.reserve([(first, 1), (second, 1)])
    assert (pool.free, first.length, second.pages) == (1, 8, [])


def test_a_rolled_back_step_leaves_everything_as_it_was() -> None:
    pool = PagePool(8, 8)
    table = pool.new_table()
    grow(pool, table, 12)
    twin = table.fork(12)
    before = list(twin.pages)
    pool.reserve([(twin, 9), (table, 1)]).rollback()
    assert (twin.pages, twin.length, pool.free) == (before, 12, 6)


def test_a_freed_state_says_so_and_frees_twice() -> None:
    pool = PagePool(2, 8)
    table = pool.new_table()
    grow(pool, table, 4)
    table.free()
    table.free()
    assert pool.free == 2
    for use in (lambda: table.fork(0), lambda: table.truncate(0), lambda: pool.reserve([(table, 1)])):
        with pytest.raises(RuntimeError, match="freed"):
            use()


@pytest.mark.parametrize("length", [-1, 5])
def test_forking_and_truncating_beyond_the_tokens_held_is_refused(length: int) -> None:
    pool = PagePool(2, 8)
    table = pool.new_table()
    grow(pool, table, 4)
    with pytest.raises(ValueError, match="holds 4 tokens"):
        table.fork(length)
    with pytest.raises(ValueError, match="holds 4 tokens"):
        table.truncate(length)


def test_a_random_walk_keeps_every_token_and_loses_no_page(rng: np.random.Generator) -> None:
    """Pages hold real tokens here: whatever is forked, truncated and freed, each sequence reads back what it wrote."""
    size = 4
    pool = PagePool(24, size)
    memory = np.full((24, size), -1)
    known: dict[PageTable, list[int]] = {}
    for step in range(600):
        table = list(known)[rng.integers(len(known))] if known and rng.random() < 0.8 else pool.new_table()
        held = known.setdefault(table, [])
        action = rng.choice(["grow", "fork", "truncate", "free"], p=[0.6, 0.15, 0.15, 0.1])
        if action == "grow":
            new = [1000 * step + i for i in range(rng.integers(1, 10))]
            try:
                reservation = pool.reserve([(table, len(new))])
            except OutOfPages:
                continue
            for source, target in reservation.copies:
                memory[target] = memory[source]
            for i, token in enumerate(new):
                at = len(held) + i
                memory[reservation.pages[0][at // size], at % size] = token
            if rng.random() < 0.2:
                reservation.rollback()
            else:
                reservation.commit()
                held += new
        elif action == "fork":
            length = int(rng.integers(0, len(held) + 1))
            known[table.fork(length)] = held[:length]
        elif action == "truncate":
            length = int(rng.integers(0, len(held) + 1))
            table.truncate(length)
            known[table] = held[:length]
        else:
            table.free()
            del known[table]
        for other, tokens in known.items():
            assert [memory[other.pages[i // size], i % size] for i in range(len(tokens))] == tokens
        held_pages = {page for other in known for page in other.pages}
        assert pool.free == 24 - len(held_pages)
        assert sum(other.owned for other in known) == len(held_pages)
