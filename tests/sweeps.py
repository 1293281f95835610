"""Which tests a usual run leaves out: sweeps, emulators, fuzzing, sanitizers, whole benchmarks and real models.

`@pytest.mark.sweep` leaves out a test; `@pytest.mark.sweep(but=("a", "b"))` leaves out its cases but those with these
names in brackets, which hold the behavior in a usual run; `@pytest.mark.sweep(only=("a",))` leaves out these cases.
`--sweeps with` runs everything, `--sweeps only` runs what a usual run leaves out. A test that is named with `::` on the
command line always runs.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pytest


def is_sweep(item: pytest.Item) -> bool:
    """Whether the nearest marker of the test, if it has one, leaves this case out."""
    mark = item.get_closest_marker("sweep")
    if mark is None:
        return False
    case = _case(item)
    if "but" in mark.kwargs:
        return case not in mark.kwargs["but"]
    return "only" not in mark.kwargs or case in mark.kwargs["only"]


def _case(item: pytest.Item) -> str:
    return item.name.partition("[")[2].removesuffix("]")


class Sweeps:
    """The pytest plugin; registered by conftest.py."""

    def __init__(self, config: pytest.Config) -> None:
        self.which: str = config.getoption("--sweeps")
        named = [argument.partition("::") for argument in config.args if "::" in argument]
        self.named = [(Path(file).resolve(), test) for file, _, test in named]
        self.left_out = 0

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        if not self.named:
            _check_names(items)
        if self.which == "with":
            return
        wanted = [i for i in items if is_sweep(i) == (self.which == "only") or self._is_named(i)]
        kept = set(wanted)
        self.left_out = len(items) - len(wanted)
        config.hook.pytest_deselected(items=[i for i in items if i not in kept])
        items[:] = wanted

    def _is_named(self, item: pytest.Item) -> bool:
        name = item.nodeid.partition("::")[2]
        return any(
            item.path == file and (name == test or name.startswith((f"{test}[", f"{test}::")))
            for file, test in self.named
        )

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.left_out and self.which == "without":
            terminalreporter.write_line(
                f"Not run here: {self.left_out} cases of sweeps, emulators, fuzzing, sanitizers, benchmarks and real "
                "models. make test-sweeps runs them, and pytest --sweeps only."
            )


def _check_names(items: Collection[pytest.Item]) -> None:
    """A name in a marker that is no case any more would leave out a behavior without a word."""
    cases: dict[int, set[str]] = {}
    marks: dict[int, tuple[str, pytest.Mark]] = {}
    for item in items:
        mark = item.get_closest_marker("sweep")
        if mark is not None and mark.kwargs:
            cases.setdefault(id(mark), set()).add(_case(item))
            marks[id(mark)] = (item.nodeid.partition("[")[0], mark)
    for key, (test, mark) in marks.items():
        if unknown := {*mark.kwargs.get("but", ()), *mark.kwargs.get("only", ())} - cases[key]:
            raise pytest.UsageError(f"{test}: the marker sweep names {sorted(unknown)}, and there is no such case")
