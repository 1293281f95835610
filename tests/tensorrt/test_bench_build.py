"""benchmarks/rtx_build.py: builds in processes of their own, and the table made of what they tell."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import rtx_build
from parts.report import markers

BEGIN, END = markers("rtx_build")
SCRIPT = str(Path(rtx_build.__file__))


@pytest.mark.sweep  # a whole benchmark
def test_a_build_is_measured_and_becomes_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    result, failed = json.loads(out.read_text())
    assert "precision='nothing' is unknown" in failed["failed"]
    assert result["engine_gb"] > 0
    assert 0 < result["stages"]["build"] < result["seconds"]
    assert result["peak_gb"] > 0.1

    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    monkeypatch.setattr(rtx_build, "DOCUMENT", page)
    assert rtx_build.document([out]) == 0
    lines = page.read_text().splitlines()
    assert lines[0] == "before"
    assert lines[-1] == "after"
    (row,) = [line for line in lines if line.startswith("| tiny-shaped, random | fp8 | dense |")]
    assert "products fp8 x fp8" in row
    assert "old" not in lines


@pytest.mark.parametrize("text", ["nothing", f"before\n{END}\n{BEGIN}\nafter\n", f"{BEGIN}\n{BEGIN}\n{END}\n"])
def test_a_page_without_the_markers_in_order_is_left_alone(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    monkeypatch.setattr(rtx_build, "DOCUMENT", page)
    assert rtx_build.document([]) == 1
    assert page.read_text() == text
