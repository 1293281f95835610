"""The clock of a run and of its parts."""

from __future__ import annotations

import time


class OutOfTime(Exception):
    """The time of a part is up; its results so far are kept."""


class Clock:
    """Seconds since the start, and seconds left.

    Args:
        limit: seconds of the whole run.
    """

    def __init__(self, limit: float) -> None:
        self.began, self.limit = time.monotonic(), limit
        self._part = limit

    @property
    def now(self) -> float:
        return time.monotonic() - self.began

    def part(self, seconds: float) -> float:
        """Start a part with this limit, or with the time left of the whole run if that is less; returns the limit."""
        self._part = min(self.now + seconds, self.limit)
        return self._part - self.now

    @property
    def left(self) -> float:
        """Seconds left of the part."""
        return self._part - self.now

    def need(self, seconds: float = 0.0) -> None:
        """Raises OutOfTime if the part has less time left."""
        if self.left <= seconds:
            raise OutOfTime("there was no time")
