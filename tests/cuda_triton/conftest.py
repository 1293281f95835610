"""Puts this folder on the path. A whole process interprets kernels or compiles them: `make test` has one for each."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

INTERPRETED = ["test_append.py", "test_decode.py", "test_linear.py", "test_prefill.py", "test_rows.py"]
COMPILED = ["test_aot.py"]
collect_ignore = COMPILED if os.environ.get("TRITON_INTERPRET") == "1" else INTERPRETED
