"""Puts the deliberately broken backends on the path, for this process and for the fresh ones that the kit starts."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
