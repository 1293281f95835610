"""Tables and messages on terminals of any width: no word is broken, and no column is cut off."""

from __future__ import annotations

import os
import re
import shutil
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner

from transom.cli import heat_map, output
from transom.cli.app import transom
from transom.cli.diagnosis import Diagnosis, Trial
from transom.contract import Refusal
from transom.errors import name_options

LONG = "ab cde a-word-of-thirty-letters-is-long " * 4
WIDTHS = (20, 40, 41, 60, 79, 80, 120)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a command as on a terminal so many columns wide; returns its lines."""

    def run(width: int, *arguments: str) -> list[str]:
        monkeypatch.setattr(output, "is_terminal", lambda stream: True)
        monkeypatch.setattr(shutil, "get_terminal_size", lambda *a: os.terminal_size((width, 24)))
        try:
            return lines(CliRunner().invoke(transom, arguments, catch_exceptions=False).stdout)
        finally:
            name_options(None)  # else errors of this process go on to name flags

    return run


def lines(text: str) -> list[str]:
    return re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()


@pytest.mark.parametrize("width", WIDTHS)
def test_a_table_fits_and_breaks_no_word(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(output, "is_terminal", lambda stream: True)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda *a: os.terminal_size((width, 24)))
    rows = [("first", LONG, "1.5 GB", "x"), ("the-second-row", "short", "", LONG)]
    output.table(("id", "text", "size", "more"), rows, right=(2,))
    shown = lines(capsys.readouterr().out)
    words = {word for row in rows for cell in row for word in cell.split()}
    assert words <= {word for line in shown for word in line.split()}
    longest = max(len(word) for word in words)
    assert max(map(len, shown)) <= max(width, longest + 4)
    assert any("1.5 GB" in line for line in shown)


@pytest.mark.parametrize("width", [40, 80])
def test_devices_fit_the_terminal_and_have_the_ids_of_the_targets(terminal: Any, width: int) -> None:
    shown = terminal(width, "devices", "--all")
    assert max(map(len, shown)) <= width
    assert any(line.split()[:1] == ["a10"] for line in shown)
    assert not any("remote:" in line for line in shown)
    assert "snapdragon-8-elite-gen-5" in {word for line in shown for word in line.split()}
    targets = {line.split()[0] for line in terminal(200, "export", "--target", "list") if line}
    assert {line.split()[0] for line in terminal(200, "devices", "--all") if "NVIDIA" in line} <= targets


@pytest.mark.parametrize("width", [80, 100])
def test_a_reason_that_many_targets_share_is_listed_once(
    terminal: Any, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transom.bundles import targets

    found = targets.targets()
    no = (("engine", Refusal("x", "missing_dep", "needs a library that is not here", "pip install library")),)
    monkeypatch.setattr(targets, "targets", lambda probe_file=None: [SimpleNamespace(
        name=t.name, device=t.device, answers=no) for t in found])  # fmt: skip
    shown = terminal(width, "export", "--target", "list")
    assert max(map(len, shown)) <= width
    assert sum("needs a library" in line for line in shown) == 1
    assert sum("none: see (1)" in line for line in shown) == len(found)


@pytest.mark.parametrize("width", WIDTHS)
def test_errors_and_warnings_break_no_word(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(output, "is_terminal", lambda stream: True)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda *a: os.terminal_size((width, 24)))
    output.print_error(click.ClickException(LONG))
    output.warn(f"{LONG} {width}")
    output.aside(LONG)
    shown = lines(capsys.readouterr().err)
    assert max(map(len, shown)) <= max(width, 31 + 4)
    assert {word for line in shown for word in line.split()} == {*LONG.split(), "Error:", "Warning:", str(width)}


def test_doctor_mends_only_what_is_broken() -> None:
    def found(*trials: Trial) -> Diagnosis:
        refusals = (("other", Refusal("cpu", "missing_dep", "other is not installed", "pip install other")),)
        empty: Any = {}
        return Diagnosis((), "this machine", (), trials, refusals, (), empty, empty, empty, empty, empty)

    works = Trial("engine", "cpu", "works", "it is fast")
    assert found(works).fixes() == []
    assert found(Trial("reference", "cpu", "works", "slow")).fixes() == ["pip install other"]
    assert found(Trial("engine", "cpu", "fails", "it broke", "mend it")).fixes() == ["mend it", "pip install other"]
    assert found(Trial("engine", "cuda:0", "works", "fast")).fixes() == ["pip install other"]


def test_the_title_of_a_heat_map_is_within_the_picture(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np
    from matplotlib.figure import Figure

    seen = []
    save = Figure.savefig

    def saved(figure: Any, path: Any, **options: Any) -> None:
        save(figure, path, **options)
        seen.append((figure, figure._suptitle.get_window_extent()))

    monkeypatch.setattr(Figure, "savefig", saved)
    shares = np.full((2, 3, 1), 0.5)
    densities: Any = SimpleNamespace(by_layer=shares.mean(-1), ends=(10, 20, 30))
    heat_map.draw(densities, tmp_path / "a.png", "A model, " + "coverage 0.94 and some more of its policy, " * 6)
    ((figure, box),) = seen
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1
    assert box.y1 <= figure.bbox.y1


@pytest.mark.parametrize(
    ("seconds", "first", "share", "text"),
    [
        (10.0, 0.0, 0.5, ", about 10 s left"),
        (60.0, 0.5, 0.6, ", about 4 min left"),  # what an earlier download left says nothing about the speed
        (2.0, 0.0, 0.5, ""),
        (60.0, 0.5, 0.5, ""),
        (60.0, 0.0, 1.0, ""),
    ],
)
def test_the_time_that_a_download_still_takes(seconds: float, first: float, share: float, text: str) -> None:
    assert output.time_left(seconds, first, share) == text


def test_a_sentence_is_printed_above_the_progress_unless_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    for quiet in (False, True):
        with output.ProgressLine(quiet=quiet) as progress:
            progress.say("Downloading o/m")
    assert capsys.readouterr().err == "Downloading o/m\n"
