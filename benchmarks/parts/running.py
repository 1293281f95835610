"""Runs the parts of a benchmark in turn within a time limit, handles their failures, and sets the exit status.

Independent of what is measured; imports no torch.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import secrets
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from parts.report import Cell, Document, PartReport, Table, line
from parts.timing import Clock, OutOfTime

OK, WRONG, NO_CARD, CUT = 0, 1, 2, 3
"""Exit status: all done and right; a number is wrong or a part failed; no card; the time was up before all was done."""
SPARE = 10.0
"""Seconds beyond the limit after which a run is ended from outside."""


class NoCard(Exception):
    """There is no card that a backend can use.

    Args:
        refused: each card that is present, and why the backend refuses it.
    """

    def __init__(self, backend: str, refused: Sequence[str]) -> None:
        why = "; ".join(refused) or "no NVIDIA driver shows one"
        super().__init__(f"No NVIDIA card is here that {backend} can use ({why}); without one, use --dry-run.")


class Measured(Protocol):
    """The card."""

    @property
    def dry(self) -> bool:
        """Whether the CPU replaces the card, so that times are meaningless."""
        ...

    def state(self) -> dict[str, Any]:
        """Current clocks, temperature and power."""
        ...


C = TypeVar("C", bound=Measured)


@dataclass
class PartContext(Generic[C]):
    """What every part receives."""

    card: C
    clock: Clock
    document: Document
    seed: int
    """Seed of everything random."""

    @property
    def dry(self) -> bool:
        return self.card.dry

    @property
    def part(self) -> PartReport:
        return self.document.parts[-1]

    def say(self, text: str) -> None:
        print(f"[{self.clock.now:5.0f} s] {text}", flush=True)

    def table(self, title: str, about: str) -> Table:
        self.say(title)
        self.part.tables.append(Table(title, about))
        return self.part.tables[-1]

    def row(self, table: Table, **cells: Cell) -> None:
        """Add a row, print it and record the card's clocks. Underscores in names become spaces."""
        found = {name.replace("_", " "): value for name, value in cells.items()}
        table.rows.append(found)
        if not self.dry:
            self.part.clocks.append(self.card.state())
        self.say(line(found))

    def check(
        self, name: str, outcome: str, reason: str = "", error: float | None = None, *, loud: bool = True
    ) -> None:
        """Record a check as passed, failed or left out; it is printed unless it passed."""
        self.document.checks.append({"name": name, "outcome": outcome, "reason": reason, "error": error})
        if loud and outcome != "passed":
            self.say(f"{outcome.upper()}  {name}: {reason}")

    def bound(self, name: str) -> float | None:
        return self.document.bounds.get(name)

    def share(self, amount: float, seconds: float | None, bound: str) -> float | None:
        """The share of a bound that `amount` in `seconds` reaches."""
        most = self.bound(bound)
        return None if seconds is None or not most else amount / seconds / most

    def abandon(self) -> None:
        """Terminate the processes that this one has started."""
        for process in multiprocessing.active_children():
            process.kill()


def options(parser: argparse.ArgumentParser) -> None:
    """Add the options of both scripts."""
    parser.add_argument("--out", help="the JSON file to write; {card} in it becomes the card's name")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, without a card")
    parser.add_argument("--seed", type=int, default=secrets.randbits(32), help="default: a new one")


def begin(run: PartContext[Any], path: str | None) -> threading.Timer:
    """Print what is measured and with what; returns the watchdog, see `watched`."""
    about = run.document
    run.say(f"{about.card['name']} ({about.card['arch']}), seed {run.seed}")
    run.say(", ".join(f"{name} {value}" for name, value in about.versions.items() if value))
    return watched(run, path)


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def function(name: str) -> Callable[[Any], None]:
    """Import `"module:function"`. Done when needed: a dry run sets the environment first."""
    from importlib import import_module

    module, _, of = name.partition(":")
    found: Callable[[Any], None] = getattr(import_module(module), of)
    return found


def perform(run: PartContext[Any], name: str, where: str, seconds: float) -> None:
    """Run one part; its state records any failure.

    Args:
        where: the function that runs it, `"module:function"`.
        seconds: its time limit.
    """
    part = PartReport(name)
    run.document.parts.append(part)
    if run.clock.part(seconds) <= 0:
        part.state, part.reason = "left out", "the time of the whole run was up"
        return
    began = run.clock.now
    run.say(f"== {name}, at most {run.clock.left:.0f} s")
    part.clocks.append(run.card.state())
    try:
        function(where)(run)
        part.state = "done"
    except OutOfTime:
        part.state, part.reason = "cut", f"it had {seconds:.0f} s"
    except Exception as e:  # noqa: BLE001  the other parts shall run all the same
        part.state, part.reason = "failed", first_line(e)
        traceback.print_exc()
    part.clocks.append(run.card.state())
    part.seconds = round(run.clock.now - began, 2)
    run.say(f"== {name}: {part.state} {part.reason}")


def status_of(document: Document) -> int:
    """The exit status for what a run has found."""
    if any(c["outcome"] == "failed" for c in document.checks) or any(p.state == "failed" for p in document.parts):
        return WRONG
    late = ("time was up", "no time")
    left_out = any(c["outcome"] == "left out" and any(t in c["reason"] for t in late) for c in document.checks)
    return CUT if left_out or any(p.state != "done" for p in document.parts) else OK


def write(run: PartContext[Any], path: str | None) -> None:
    """The result so far; `{card}` in the path is the card's name."""
    run.document.seconds = round(run.clock.now, 1)
    if path is None:
        return
    name = re.sub(r"[^a-z0-9]+", "-", str(run.document.card["name"]).lower()).strip("-")
    target = Path(path.replace("{card}", name))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(run.document.to_dict(), indent=1) + "\n")
    run.say(f"wrote {target}")


def watched(run: PartContext[Any], path: str | None) -> threading.Timer:
    """Ends the run from outside if it is still there shortly after its limit; `cancel` it."""
    watch = threading.Timer(run.clock.limit + SPARE, _stop, (run, path))
    watch.daemon = True
    watch.start()
    return watch


def _stop(run: PartContext[Any], path: str | None) -> None:
    """The time is up while something still runs: write the results so far, and end this process and its children."""
    for part in run.document.parts:
        if part.state == "running":
            part.state, part.reason = "cut", "the time of the whole run was up"
    run.document.status = status_of(run.document)
    write(run, path)
    run.abandon()
    sys.stdout.flush()
    os._exit(run.document.status or CUT)


def finish(run: PartContext[Any], path: str | None) -> int:
    """Print failures and what was left out, write the result, and return the exit status."""
    about = run.document
    about.status = status_of(about)
    for check in about.checks:
        if check["outcome"] == "failed":
            print(f"FAILED  {check['name']}: {check['reason']}")
    for part in about.parts:
        if part.state != "done":
            print(f"{part.state}  {part.name}: {part.reason}")
    write(run, path)
    counts = {o: sum(c["outcome"] == o for c in about.checks) for o in ("passed", "failed", "left out")}
    print(f"checks: {', '.join(f'{n} {o}' for o, n in counts.items())}; {about.seconds:.0f} s; status {about.status}")
    return about.status
