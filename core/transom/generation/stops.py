"""Stop strings over a text that comes in pieces: what may be shown, and when to stop.

Text that may still turn out to be the beginning of a stop string is held back. The outcome does not depend on where
the pieces are cut: the stop string that is complete first wins, and of those that end together the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Released(NamedTuple):
    """Text that is final, and the stop string that ended it, if any."""

    text: str
    stop: str | None


class StopStrings:
    """Watches one text for any of several strings; none of them is empty."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> Released:
        """Take the next piece. After a stop string was found, nothing more may be pushed."""
        if not self._stops:
            return Released(text, None)
        held = self._held + text
        found = [(place + len(stop), place, stop) for stop in self._stops if (place := held.find(stop)) >= 0]
        if found:
            _, place, stop = min(found)
            self._held = ""
            return Released(held[:place], stop)
        keep = self._may_begin(held)
        self._held = held[len(held) - keep :]
        return Released(held[: len(held) - keep], None)

    def finish(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _may_begin(self, text: str) -> int:
        """The length of the longest end of `text` with which a stop string begins."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
