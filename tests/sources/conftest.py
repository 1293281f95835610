"""Puts `checkpoints` of the folder above where these tests can import it, and gives each test a fresh generator."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
