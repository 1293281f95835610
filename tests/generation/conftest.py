"""Lets the tests import the fakes beside them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def rng(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    """A NumPy generator from a fresh seed, which is printed with the output of a failing test."""
    import secrets

    import numpy as np

    seed = secrets.randbits(64)
    print(f"seed: {seed}")
    return np.random.default_rng(seed)
