"""Finds stop strings in a text that arrives in pieces.

Text that may be the beginning of a stop string is held back. The result does not depend on how the text is split: the
stop string that is complete first wins, and among those that end together the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class StopScan(NamedTuple):
    """Final text, and the stop string that ended it, if any."""

    text: str
    stop: str | None


class StopStrings:
    """Searches one text for several strings, none of which is empty."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> StopScan:
        """Process the next piece. Do not call again after a stop string was found."""
        if not self._stops:
            return StopScan(text, None)
        held = self._held + text
        found = [(place + len(stop), place, stop) for stop in self._stops if (place := held.find(stop)) >= 0]
        if found:
            _, place, stop = min(found)
            self._held = ""
            return StopScan(held[:place], stop)
        keep = self._may_begin(held)
        self._held = held[len(held) - keep :]
        return StopScan(held[: len(held) - keep], None)

    def finish(self) -> str:
        """The text that was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held

    def _may_begin(self, text: str) -> int:
        """The length of the longest suffix of `text` that is a prefix of a stop string."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
