"""Damage is reported, options are read within limits, requirements are compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from transom.authoring.opening import context_of, paths_of, reading_artifact, threads_of
from transom.authoring.requirements import compare_requirements
from transom.contract import Artifact, Device, Verdict
from transom.errors import EngineError

CPU = Device("cpu", "cpu:0", "x86_64", 1 << 30, cores=6)


def test_damage_is_an_error_with_a_fix_and_bugs_are_not_hidden() -> None:
    with (
        pytest.raises(EngineError, match=r"is damaged: 'plan\.json'") as caught,
        reading_artifact(),
    ):
        _ = {}["plan.json"]
    assert caught.value.fix == "Remove it with: transom cache clear"
    with pytest.raises(EngineError) as caught, reading_artifact("Export it again"):
        json.loads("{")
    assert caught.value.fix == "Export it again"
    with pytest.raises(AssertionError), reading_artifact():
        raise AssertionError
    assert paths_of(Artifact({"a": Path("x"), "b": b"y"}, {})) == {"a": Path("x")}


def test_options_win_within_the_limits() -> None:
    assert [context_of({"context": c}, 100, 64) for c in (None, 20, 80)] == [64, 20, 64]
    assert [context_of({}, 100), context_of({"context": 300}, 100)] == [100, 100]
    assert [threads_of({"threads": t}, CPU) for t in (None, 2)] == [6, 2]


def test_the_first_difference_of_requirements_is_named() -> None:
    assert compare_requirements({"a": "1", "context": "64"}, {"a": "1"}) == Verdict("ok")
    assert compare_requirements({"a": "1", "b": "2"}, {"a": "1", "b": "3"}) == Verdict(
        "rebuild", "compiled for b 2, and here it is 3"
    )
    assert compare_requirements({}, {"a": "1"}).reason == "compiled for a unknown, and here it is 1"
