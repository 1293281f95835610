"""Puts `made_up_machines` where the tests of this folder can import it; pytest adds no folder to the path by itself."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
