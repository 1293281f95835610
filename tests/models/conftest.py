"""Puts `checkpoints` of the folder above where these tests can import it, and gives each test a fresh generator."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))


@pytest.fixture
def rng():  # type: ignore[no-untyped-def]
    """A NumPy generator from a fresh seed, which is printed with the output of a failing test."""
    from checkpoints import fresh_rng

    return fresh_rng()
