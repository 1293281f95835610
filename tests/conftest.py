"""What every test has: random inputs from a seed that its name fixes (see draws.py), and a Ctrl-C that works."""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

# Before numpy and torch are imported, here and in processes that tests start: their threads wait by spinning, and tests
# are too small to be quicker with more than one.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import forked
from draws import Draws
from sweeps import Sweeps

from transom import plugin_trials
from transom.preparation import child

# What torch and others import leaves a million objects, and a fifth of the time went into looking at them.
gc.set_threshold(50_000, 20, 50)

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A run that a shell started in the background ignores interrupts, and so would every process that tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("random inputs")
    often = "run only tests that draw random inputs, each N times, each time with a fresh seed"
    group.addoption("--fresh-seeds", type=int, default=0, metavar="N", help=often)
    limit = "with --fresh-seeds: a test gets no further draw after S seconds; 10 by default"
    group.addoption("--draw-seconds", type=float, default=10.0, metavar="S", help=limit)
    which = "what a usual run leaves out (marker sweep): run all without it, with it, or only that"
    parser.getgroup("sweeps").addoption("--sweeps", choices=("without", "with", "only"), default="without", help=which)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "seeds(number, ...): further cases, with seeds that once made the test fail")
    config.addinivalue_line("markers", "sweep(but=names, only=names): left out of a usual run; see sweeps.py")
    fresh = "fresh_interpreters: processes of the test are started anew, not forked; see forked.py"
    config.addinivalue_line("markers", fresh)
    config.pluginmanager.register(Sweeps(config), "sweeps")
    config.pluginmanager.register(Draws(config), "draws")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    numbers = [number for mark in metafunc.definition.iter_markers("seeds") for number in mark.args]
    if numbers:
        names = [pytest.HIDDEN_PARAM, *(f"seed={number}" for number in numbers)]
        metafunc.parametrize("seed", [None, *numbers], indirect=True, ids=names)


@pytest.fixture(scope="session", autouse=True)
def temporary_files() -> Iterator[None]:
    """What tests and backends leave in temporary files goes with the run: artifacts that a backend gave are the host's
    to remove, and a test is not always one."""
    with tempfile.TemporaryDirectory(prefix="transom-tests-", ignore_cleanup_errors=True) as folder:
        saved, tempfile.tempdir = tempfile.tempdir, folder
        # Tests start hundreds of processes. Where Python writes no bytecode (PYTHONDONTWRITEBYTECODE, or a read-only
        # checkout), each of them would compile Transom again, which takes as long as all else that it does.
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.environ["PYTHONPYCACHEPREFIX"] = os.path.join(folder, "bytecode")
        yield
        tempfile.tempdir = saved


@pytest.fixture(scope="session", autouse=True)
def forked_processes() -> None:
    """Processes in which Transom compiles and tries plugins are forked, see forked.py."""
    child.subprocess = plugin_trials.subprocess = forked  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def fresh_interpreters(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("fresh_interpreters") is not None:
        monkeypatch.setattr(child, "subprocess", subprocess)
        monkeypatch.setattr(plugin_trials, "subprocess", subprocess)


@pytest.fixture
def seed(request: pytest.FixtureRequest, pytestconfig: pytest.Config) -> int:
    """The seed that belongs to the name of the test; TRANSOM_TEST_SEED sets another."""
    draws: Draws = pytestconfig.pluginmanager.getplugin("draws")  # type: ignore[assignment]
    return draws.number(request.node.name)


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture
def dice(seed: int) -> random.Random:
    return random.Random(seed)


@pytest.fixture(scope="session")
def shared_rng(pytestconfig: pytest.Config) -> Callable[[str], np.random.Generator]:
    """For fixtures that several tests share: the generator that belongs to a name, the same whoever asks first."""
    draws: Draws = pytestconfig.pluginmanager.getplugin("draws")  # type: ignore[assignment]
    return lambda name: np.random.default_rng(draws.shared(name))
