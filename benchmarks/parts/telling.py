"""How a process reports to its parent: one dictionary, among anything else that it prints."""

from __future__ import annotations

import json
from typing import Any

MARK = "RESULT "


def tell(found: dict[str, Any]) -> None:
    """Report results from a child process."""
    print(MARK + json.dumps(found), flush=True)


def told(status: int, out: str, errors: str) -> dict[str, Any]:
    """The report of a child process that has ended.

    Args:
        status: its exit status.

    Raises:
        RuntimeError: it reported nothing; its last message is included.
    """
    for line in reversed(out.splitlines()):
        if line.startswith(MARK):
            found: dict[str, Any] = json.loads(line.removeprefix(MARK))
            return found
    said = errors.strip().splitlines() or ["nothing"]
    raise RuntimeError(f"the process ended with status {status}: {said[-1]}")
