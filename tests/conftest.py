"""What every test has: random inputs from a fresh seed, printed where a test fails, and a Ctrl-C that works."""

from __future__ import annotations

import os
import secrets
import signal
import tempfile
from collections.abc import Iterator

import numpy as np
import pytest

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A run that a shell started in the background ignores interrupts, and so would every process that tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def temporary_files() -> Iterator[None]:
    """What tests and backends leave in temporary files goes with the run: artifacts that a backend gave are the host's
    to remove, and a test is not always one."""
    with tempfile.TemporaryDirectory(prefix="transom-tests-", ignore_cleanup_errors=True) as folder:
        saved, tempfile.tempdir = tempfile.tempdir, folder
        yield
        tempfile.tempdir = saved


@pytest.fixture
def seed() -> int:
    """A fresh seed; TRANSOM_TEST_SEED repeats one."""
    number = int(os.environ.get("TRANSOM_TEST_SEED", 0)) or secrets.randbits(32)
    print(f"seed = {number}; repeat with TRANSOM_TEST_SEED={number}")
    return number


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)
