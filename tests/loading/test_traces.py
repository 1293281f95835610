"""The traces in docs/architecture.md: a call enters the files in the order that the page gives.

Draws: the weights decide nothing here, only which files run.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import transom

CORE = Path(transom.__file__).parent
PAGE = Path(__file__).parents[2] / "docs" / "architecture.md"
ROOMS = ("api.py", "loading/", "bundles/", "preparation/", "generation/")
CO_OPTIMIZED = 1
"""The flag of functions; the code of modules and classes lacks it."""


def documented(trace: str) -> list[str]:
    """The files that a trace lists, each where it is named first."""
    section = PAGE.read_text(encoding="utf-8").split("### Traces")[1].split("\n## ")[0]
    (text,) = re.findall(rf"^{re.escape(trace)}:\n(.*?)(?=^`|\Z)", section, re.M | re.S)
    steps = re.sub(r"\([^)]*\)", "", text)
    return list(dict.fromkeys(re.findall(r"`((?:\w+/)?\w+\.py)`", steps)))


@contextmanager
def recorded() -> Iterator[list[str]]:
    """The files of these rooms whose functions are called, in the order of their first calls."""
    files: list[str] = []

    def note(frame: FrameType, event: str, argument: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event != "call" or not frame.f_code.co_flags & CO_OPTIMIZED or not path.is_relative_to(CORE):
            return
        file = path.relative_to(CORE).as_posix()
        if file.startswith(ROOMS) and file not in files:
            files.append(file)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield files
    finally:
        sys.setprofile(before)


def check(trace: str, files: list[str]) -> None:
    named = documented(trace)
    assert len(named) > 4
    assert [file for file in files if file in named] == named


def test_a_cold_load_and_a_warm_one_go_as_documented(here: Any) -> None:
    with recorded() as cold:
        here.load(backend="reference").close()
    check("`load`, cold", cold)
    with recorded() as warm:
        here.load(backend="reference").close()
    check("`load`, warm", warm)
    assert not [file for file in warm if file.startswith("bundles/")]


def test_a_bundle_is_loaded_as_documented(here: Any, export: Any) -> None:
    bundle = export(format="reference").folder
    here.load(bundle).close()
    with recorded() as files:
        here.load(bundle).close()
    check("`load` of a bundle that has run here before", files)


def test_text_is_generated_as_documented(here: Any) -> None:
    with here.load(backend="reference") as model, recorded() as files:
        model.generate("Hello", max_new_tokens=2)
    check("`Model.generate`", files)


def test_a_file_out_of_order_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test of the test."""
    with pytest.raises(AssertionError):
        check("`load`, warm", ["loading/options.py", "api.py"])
