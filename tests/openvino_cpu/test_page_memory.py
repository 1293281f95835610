"""Memory behind pages comes from the system as it is written to, and goes back when nobody holds the pages.

Draws: pages hold no zero before they are dropped; which become zeros follows from their size.
"""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest

from transom.sessions import PagePool
from transom_openvino_cpu.page_memory import PageMemory, runs

needs_linux = pytest.mark.skipif(not hasattr(mmap, "MADV_REMOVE"), reason="only Linux takes memory back")


def shared_memory() -> int:
    """Bytes of anonymous memory that this process holds, of the kind that pages are made of."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssShmem:"))


def test_runs_of_pages() -> None:
    assert list(runs([])) == []
    assert list(runs([3])) == [(3, 4)]
    assert list(runs([5, 2, 3, 9, 4, 0])) == [(0, 1), (2, 6), (9, 10)]


@needs_linux
@pytest.mark.parametrize("size", [100, 4096, 32256, 100_000])
def test_dropped_pages_are_zeros_and_their_neighbors_stay(size: int, rng: np.random.Generator) -> None:
    memory = PageMemory(50, size)
    memory.bytes[:] = rng.integers(1, 256, (50, size), np.uint8)
    before = memory.bytes.copy()
    dropped = sorted(rng.choice(50, 20, replace=False).tolist())
    memory.drop(dropped)
    kept = [p for p in range(50) if p not in dropped]
    assert np.array_equal(memory.bytes[kept], before[kept])
    whole = memory.bytes[dropped].reshape(-1)
    assert ((whole == 0) | (whole == before[dropped].reshape(-1))).all()
    if size >= 2 * mmap.PAGESIZE:
        assert (whole == 0).mean() > 0.5


@needs_linux
def test_dropped_memory_goes_back() -> None:
    start = shared_memory()
    memory = PageMemory(64, 1 << 20)
    assert shared_memory() - start < 1 << 20
    memory.bytes[:] = 1
    assert shared_memory() - start > 60 << 20
    memory.drop(range(10, 64))
    assert shared_memory() - start < 12 << 20


def test_a_pool_tells_of_pages_that_nobody_holds() -> None:
    told: list[list[int]] = []
    pool = PagePool(8, 4, lambda pages: told.append(list(pages)))
    first, second = pool.new_table(), pool.new_table()
    pool.reserve([(first, 10)]).commit()
    twin = first.fork(8)
    first.free()
    assert told == [[2]]  # the others belong to the twin
    pool.reserve([(second, 4)]).rollback()
    assert told == [[2], [2]]
    twin.truncate(3)
    assert told[2:] == [[1]]
    twin.free()
    twin.free()
    assert told[3:] == [[0]]
    assert pool.free == 8
