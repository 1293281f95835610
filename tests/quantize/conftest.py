"""Lets these tests import `checkpoints` from the folder above, and the module beside them."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in (Path(__file__).parents[1], Path(__file__).parent):
    sys.path.insert(0, str(folder))
