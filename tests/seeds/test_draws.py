"""`draws.py` seeds each test by its name, by TRANSOM_TEST_SEED, by the marker `seeds`, and freshly with --fresh-seeds.

Each case runs pytest in a process of its own, on a small file of tests with the project's `conftest.py`.

Draws: what the small tests draw is only compared between runs; different seeds give numbers below 2^60 or seeds below
2^32, and two of a handful are equal about once in 10^8 runs.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from draws import named

TESTS = Path(__file__).parents[1]
FILE = """
import pytest

def record(request, *numbers):
    with open("drawn.txt", "a") as file:
        print(request.node.name, *numbers, file=file)

@pytest.fixture(scope="module")
def shared(shared_rng):
    return shared_rng("shared").integers(1 << 60)

def test_first(request, seed, rng, shared):
    record(request, seed, rng.integers(1 << 60), shared)

@pytest.mark.seeds(7, 8)
def test_marked(request, seed, rng, shared):
    record(request, seed, rng.integers(1 << 60), shared)

def test_without_random_inputs(request):
    record(request)

def test_failing(request, seed, rng):
    record(request, seed, rng.integers(1 << 60))
    assert False
"""
Drawn = list[tuple[str, list[int]]]
"""The name of each test that ran, in order, with the numbers that it recorded: its seed first."""


def run(folder: Path, *arguments: str, seed: int | None = None) -> tuple[Drawn, str]:
    """Run the tests of `FILE` in a folder, and return what they recorded and pytest's output."""
    folder.mkdir(exist_ok=True)
    for name in ("conftest.py", "draws.py", "forked.py", "sweeps.py"):
        shutil.copy(TESTS / name, folder)
    (folder / "test_small.py").write_text(FILE)
    (folder / "drawn.txt").unlink(missing_ok=True)
    environment = {key: value for key, value in os.environ.items() if key != "TRANSOM_TEST_SEED"}
    if seed is not None:
        environment["TRANSOM_TEST_SEED"] = str(seed)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *(arguments or ["test_small.py"])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=120)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    lines = [line.split() for line in (folder / "drawn.txt").read_text().splitlines()]
    return [(name, [int(number) for number in numbers]) for name, *numbers in lines], done.stdout


@pytest.mark.parametrize(
    ("name", "number"), [("test_first", 1213632985), ("test_case[a-1]", 135582474), ("shared", 1751700132)]
)
def test_a_name_has_the_same_seed_on_every_machine(name: str, number: int) -> None:
    assert named(name) == number


def test_seeds_depend_on_the_name_alone(tmp_path: Path) -> None:
    forward, _ = run(tmp_path / "forward")
    tests = ["test_small.py::test_failing", "test_small.py::test_marked", "test_small.py::test_first"]
    backward, _ = run(tmp_path / "backward", *tests)
    assert [name for name, _ in backward][:2] == ["test_failing", "test_marked"]
    assert dict(backward).items() <= dict(forward).items()
    seeds = {name: numbers[0] for name, numbers in forward if numbers}
    assert [seeds[name] for name in ("test_first", "test_marked", "test_failing")] == [
        named(name) for name in ("test_first", "test_marked", "test_failing")
    ]


def test_the_environment_sets_the_seed_of_every_test(tmp_path: Path) -> None:
    first, _ = run(tmp_path / "first", seed=4711)
    second, _ = run(tmp_path / "second", "test_small.py::test_failing", seed=4711)
    seeds = {name: numbers[0] for name, numbers in first if numbers}
    assert seeds == {
        "test_first": 4711, "test_marked": 4711, "test_marked[seed=7]": 7, "test_marked[seed=8]": 8,
        "test_failing": 4711,
    }  # fmt: skip
    assert dict(second)["test_failing"] == dict(first)["test_failing"]
    assert dict(first)["test_failing"][1] != dict(run(tmp_path / "third")[0])["test_failing"][1]


def test_a_marker_adds_cases_with_its_seeds(tmp_path: Path) -> None:
    found, _ = run(tmp_path, "test_small.py::test_marked")
    assert [(name, numbers[0]) for name, numbers in found] == [
        ("test_marked", named("test_marked")), ("test_marked[seed=7]", 7), ("test_marked[seed=8]", 8),
    ]  # fmt: skip
    assert len({tuple(numbers[1:]) for _, numbers in found}) == 3  # also what a shared fixture draws


def test_fresh_seeds_repeat_only_tests_that_draw_and_say_how_to_repeat_a_failure(tmp_path: Path) -> None:
    found, out = run(tmp_path, "--fresh-seeds", "2", "test_small.py")
    assert [name for name, _ in found] == [name for name in ("test_first", "test_marked", "test_failing") for _ in "ab"]
    assert len({numbers[0] for _, numbers in found}) == 6
    failed = [numbers for name, numbers in found if name == "test_failing"]
    printed = re.findall(r"TRANSOM_TEST_SEED=(\d+) .* test_small\.py::test_failing", out)
    assert set(printed) == {str(numbers[0]) for numbers in failed}
    again, _ = run(tmp_path, "test_small.py::test_failing", seed=failed[0][0])
    assert again == [("test_failing", failed[0])]
