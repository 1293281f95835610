"""Makes `checkpoints` from the parent folder importable, and gives each test a new random generator."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
