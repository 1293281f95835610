"""Random inputs for every test: a fresh seed each time, printed where a test fails."""

from __future__ import annotations

import os
import secrets

import numpy as np
import pytest


@pytest.fixture
def seed() -> int:
    """A fresh seed; TRANSOM_TEST_SEED repeats one."""
    number = int(os.environ.get("TRANSOM_TEST_SEED", 0)) or secrets.randbits(32)
    print(f"seed = {number}; repeat with TRANSOM_TEST_SEED={number}")
    return number


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)
