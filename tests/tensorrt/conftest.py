"""Puts this folder on the path, and one compiled network of each test's own at hand."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
