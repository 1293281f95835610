"""Which random numbers a test draws: seeds fixed by names, and fresh ones on demand.

A test's seed is a hash of its own name with its parameters, so a run of the tests is the same on every machine, in any
order, and in any folder. `--fresh-seeds N` runs each test that draws something N times instead, with a fresh seed each
time, and says how to repeat what failed: TRANSOM_TEST_SEED=number sets the seed of every test of a run. A marker
`seeds(number, ...)` gives a test further cases with the seeds that once made it fail.
"""

from __future__ import annotations

import hashlib
import os
import random
import secrets
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _pytest.runner import runtestprotocol

DRAWING = frozenset({"seed", "shared_rng"})
"""A test that has one of these, directly or through another fixture, draws random inputs."""
MOST_FAILURES = 3
"""Of one test, after which it gets no further draws."""


def named(name: str) -> int:
    """The seed that belongs to a name, 1 to 2^32 - 1."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little") or 1


def is_random(item: pytest.Item) -> bool:
    """Whether a test draws anything."""
    return bool(DRAWING & set(getattr(item, "fixturenames", ()))) or _by_hypothesis(item) or _of_the_kit(item)


def _by_hypothesis(item: pytest.Item) -> bool:
    return bool(getattr(getattr(item, "obj", None), "is_hypothesis_test", False))


def _of_the_kit(item: pytest.Item) -> bool:
    """Whether a test is a check of `transom.testing.BackendConformance`, whose class has the seed."""
    of_class = getattr(getattr(item, "cls", None), "__mro__", ())
    return any(c.__name__ == "BackendConformance" for c in of_class) and "name" in getattr(item, "fixturenames", ())


@dataclass
class Tally:
    """How one test fared with fresh seeds."""

    draws: int = 0
    seconds: float = 0.0
    failed: list[int] = field(default_factory=list)


class Draws:
    """The pytest plugin; registered by conftest.py."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.fresh: int = config.getoption("--fresh-seeds")
        self.seconds: float = config.getoption("--draw-seconds")
        self.given = int(os.environ.get("TRANSOM_TEST_SEED", 0)) or None
        self.forced = self.given
        """The seed of the test that runs and of the fixtures it shares with others; None: by their names."""
        self.tallies: dict[str, Tally] = {}

    def number(self, name: str) -> int:
        """The seed for the test of this name."""
        number = self.forced or named(name)
        print(f"{name}: seed = {number}; repeat with TRANSOM_TEST_SEED={number}")
        return number

    def shared(self, name: str) -> int:
        """The seed for the shared fixture of this name: never that of the test that uses it, which might draw the same
        model twice where it needs two."""
        return named(name) if self.forced is None else named(f"{name} {self.forced}")

    # --- each test with its seed --------------------------------------------------------------------------------------
    def _force(self, item: pytest.Item, number: int | None) -> None:
        _seed_libraries(number or named(item.name))
        if number != self.forced:
            self.forced = number
            self._forget_shared(item)
        if _by_hypothesis(item):
            import hypothesis  # an environment without it has no such test

            hypothesis.seed(number or named(item.name))(item.function)  # type: ignore[attr-defined]
        if _of_the_kit(item):
            item.cls.seed = number or named(item.cls.__name__)  # type: ignore[attr-defined]

    def _forget_shared(self, item: pytest.Item) -> None:
        """What fixtures of modules and of the session drew is drawn again; what depends on it is made again."""
        known: Any = item.session._fixturemanager
        for fixture in known.getfixturedefs("shared_rng", item) or ():
            fixture.finish(item._request)  # type: ignore[attr-defined]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        if not is_random(item):
            _seed_libraries(named(item.name))
            return None
        if not self.fresh:
            self._force(item, (getattr(item, "callspec", None) and item.callspec.params.get("seed")) or self.given)  # type: ignore[attr-defined]
            return None  # pytest goes on
        self._run_often(item, nextitem)
        return True

    # --- fresh seeds --------------------------------------------------------------------------------------------------
    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Only tests that draw, and no case with a seed of its own: those are part of a usual run."""
        if self.fresh:
            chosen = [i for i in items if is_random(i) and not _own_seed(i)]
            config.hook.pytest_deselected(items=[i for i in items if i not in set(chosen)])
            items[:] = chosen

    def _run_often(self, item: pytest.Item, nextitem: pytest.Item | None) -> None:
        tally, begin = Tally(), time.monotonic()
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        while True:
            number = secrets.randbits(32) or 1
            if not hasattr(item, "_request") or not item._request:
                item._initrequest()  # type: ignore[attr-defined]
            self._force(item, number)
            # Up to the module nothing is torn down before the last draw, as if its parent came next.
            reports = runtestprotocol(item, log=False, nextitem=item.parent)  # type: ignore[arg-type]
            self.tallies[item.nodeid] = tally  # not before: a run may be interrupted in its first draw
            tally.draws += 1
            tally.seconds = time.monotonic() - begin
            failed = any(r.failed for r in reports)
            if failed:
                tally.failed.append(number)
                self._say(f"\n{_command(item.nodeid, number)}")
            enough = tally.draws == self.fresh or tally.seconds > self.seconds or len(tally.failed) == MOST_FAILURES
            stop = enough or item.session.shouldfail or item.session.shouldstop
            if failed or (stop and not tally.failed):
                for report in reports:
                    item.ihook.pytest_runtest_logreport(report=report)
            if stop:
                break
        item.session._setupstate.teardown_exact(nextitem)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)

    def _say(self, line: str) -> None:
        """At once: a run of hours may be ended before its summary."""
        terminal: Any = self.config.pluginmanager.getplugin("terminalreporter")
        terminal.write_line(line)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.fresh:
            return
        write = terminalreporter.write_line
        terminalreporter.section("fresh seeds")
        tests, draws = len(self.tallies), sum(t.draws for t in self.tallies.values())
        short = {name: t for name, t in self.tallies.items() if t.draws < self.fresh and not t.failed}
        write(f"{tests} tests, {draws} draws; {tests - len(short)} tests had all {self.fresh} or failed.")
        if short:
            write(f"These had fewer, because they took more than {self.seconds:g} s (draws, seconds a draw, test):")
            for name, tally in sorted(short.items(), key=lambda x: x[1].draws):
                write(f"{tally.draws:6} {tally.seconds / tally.draws:8.2f}  {name}")
        failed = {name: t for name, t in self.tallies.items() if t.failed}
        if failed:
            write(f"{len(failed)} tests failed. Each command repeats one failure:")
        for name, tally in failed.items():
            for number in tally.failed:
                write(f"{_command(name, number)}  # after {tally.draws} draws")


def _seed_libraries(number: int) -> None:
    """What libraries draw from generators of the whole process, such as torch for a module's first weights."""
    random.seed(number)
    np.random.seed(number)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(number)


def _own_seed(item: pytest.Item) -> int | None:
    """The seed of a case that a marker `seeds` adds."""
    cases = getattr(item, "callspec", None)
    return cases.params.get("seed") if cases else None


def _command(name: str, number: int) -> str:
    python = Path(sys.executable)
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    kept = [f"{key}={os.environ[key]}" for key in ("TRITON_INTERPRET", "PYTHONHASHSEED") if key in os.environ]
    return " ".join([*kept, f"TRANSOM_TEST_SEED={number}", str(python), "-m pytest", shlex.quote(name)])
