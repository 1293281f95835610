"""The clock of a run and of its parts."""

from __future__ import annotations

import time


class OutOfTime(Exception):
    """The time of a part is up; what it has measured stands."""


class Clock:
    """Seconds since the start, and how many are left.

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
        """A part begins and may take so long, but no longer than the whole run has. What it may take."""
        self._part = min(self.now + seconds, self.limit)
        return self._part - self.now

    @property
    def left(self) -> float:
        """Of the part."""
        return self._part - self.now

    def need(self, seconds: float = 0.0) -> None:
        """Raises OutOfTime where the part has less than that."""
        if self.left <= seconds:
            raise OutOfTime("there was no time")
