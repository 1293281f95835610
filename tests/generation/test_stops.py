"""Stop strings are found for every split of the text, and no possible part of one is shown early.

Draws: what is compared must be equal, whatever the numbers are.
"""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from transom.generation.stops import StopStrings

letters = st.text("ab\n", max_size=30)
stop_strings = st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=3)


def plain(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Character by character: the string that is complete first wins; of several, the longest."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end - len(stop)], stop
    return text, None


@given(letters, stop_strings, st.data())
def test_the_outcome_does_not_depend_on_where_the_text_is_cut(text: str, stops: list[str], data: Any) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    watcher = StopStrings(stops)
    shown, found = "", None
    expected, stop = plain(text, stops)
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        released, found = watcher.push(text[start:end])
        shown += released
        assert expected.startswith(shown)
        if found is not None:
            break
    else:
        shown += watcher.finish()
    assert (shown, found) == (expected, stop)


@given(letters, stop_strings)
def test_only_what_may_begin_a_stop_string_is_held_back(text: str, stops: list[str]) -> None:
    watcher = StopStrings(stops)
    released, found = watcher.push(text)
    if found is None:
        held = text[len(released) :]
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)
