"""What the benchmarks of cards say where they cannot measure."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path


def assert_no_card_is_reported(done: subprocess.CompletedProcess[str], folder: Path) -> None:
    """A run without a card gives one sentence, and no file in the folder of its output."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("No NVIDIA card")
    assert done.stderr.count("\n") == 1
    assert not list(folder.iterdir())


def assert_no_time_is_reported(done: subprocess.CompletedProcess[str], path: Path) -> None:
    """A run without any time leaves out every part, and its file says so."""
    assert done.returncode == 3
    assert {p["state"] for p in json.loads(path.read_text())["parts"]} == {"left out"}
