"""The state of one call of `load` or `export`: its options and cache, its warnings and timings."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from transom.artifacts import Cache, TemporaryCache
from transom.errors import CacheError

if TYPE_CHECKING:
    from transom.contract import Progress
    from transom.loading.options import LoadOptions


@dataclass
class Stages:
    """Seconds of each stage of a load, in order."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - start)

    def add(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds


@dataclass
class LoadState:
    """Options, cache and progress of one call; its warnings and timings."""

    options: LoadOptions
    cache: Cache
    """Replaced by a temporary cache if it cannot keep a result."""
    progress: Progress
    stages: Stages = field(default_factory=Stages)
    warnings: list[str] = field(default_factory=list)
    held: list[object] = field(default_factory=list)
    """Cache entries and temporary caches that must live as long as the model."""

    def use_temporary_cache(self, why: list[str]) -> None:
        """Continue with a temporary cache, and add the old cache's warnings, or else `why`."""
        overflow = TemporaryCache()
        self.held.append(overflow)
        self.warnings += self.cache.warnings or why
        self.cache = Cache(overflow.root, limit=None)

    def no_room(self, what: str) -> CacheError:
        return CacheError(
            f"Neither the cache nor the temporary folder {self.cache.root} can keep {what}",
            "Free some disk space, or set TRANSOM_CACHE to a folder with room",
        )
