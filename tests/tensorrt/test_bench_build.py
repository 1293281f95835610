"""benchmarks/rtx_build.py: builds in processes of their own, and the table made of what they tell."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import rtx_build
from parts.results import read
from tables_parts.builds import builds

SCRIPT = str(Path(rtx_build.__file__))


@pytest.mark.sweep  # a whole benchmark
def test_a_build_is_measured_and_becomes_a_line(tmp_path: Path) -> None:
    out = tmp_path / "tiny.json"
    command = [
        sys.executable,
        SCRIPT,
        "--shape",
        "tiny",
        "--precision",
        "fp8,nothing",
        "--context",
        "256",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1  # the second one
    assert "nothing      failed: " in done.stdout
    made = read(out)
    assert made.script == "rtx_build"
    result, failed = made.rows("builds")
    assert "precision='nothing' is unknown" in failed["failed"]
    assert result["engine_gb"] > 0
    assert 0 < result["stages"]["build"] < result["seconds"]
    assert result["peak_gb"] > 0.1

    lines = done.stdout.splitlines()
    assert builds([made])[2:] == [line for line in lines if line.startswith("| tiny-shaped, random | fp8 | dense |")]
    assert "products fp8 x fp8" in builds([made])[2]
