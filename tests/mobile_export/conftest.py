"""Puts this folder, those of the two backends' helpers and the shared checkpoints on the path."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
for folder in (HERE, HERE / "onnx", HERE / "qnn", HERE.parent, HERE.parents[1] / "benchmarks"):
    sys.path.insert(0, str(folder))
