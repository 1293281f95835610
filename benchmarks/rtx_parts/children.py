"""Child processes with one task and one report each: a crash stays in its process, and a late process is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from parts.telling import told
from parts.timing import OutOfTime

from rtx_parts.bench import RtxBench

SCRIPT = Path(__file__).resolve().parents[1] / "rtx.py"


def ask(bench: RtxBench, what: str, **arguments: Any) -> dict[str, Any]:
    """Run the script's child `what`; returns its report.

    Args:
        arguments: JSON types, and paths.

    Raises:
        OutOfTime: the part's time was up before the report; the child is terminated.
        RuntimeError: the child failed; its last message is included.
    """
    bench.clock.need()
    given = json.dumps({"dry": bench.dry, **arguments}, default=str)
    command = [sys.executable, str(SCRIPT), "--child", what, given]
    environment = {**os.environ, "TMPDIR": str(bench.folder)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        bench.child = process
        try:
            out, errors = process.communicate(timeout=max(0.1, bench.clock.left))
        except subprocess.TimeoutExpired:
            raise OutOfTime("there was no time") from None
        finally:
            process.kill()
            bench.child = None
    return told(process.returncode, out, errors)
