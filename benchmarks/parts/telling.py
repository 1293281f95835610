"""How a process reports to its parent: one dictionary, among anything else that it prints."""

from __future__ import annotations

import json
from typing import Any

MARK = "RESULT "


def tell(found: dict[str, Any]) -> None:
    """In a child: what it has found."""
    print(MARK + json.dumps(found), flush=True)


def told(status: int, out: str, errors: str) -> dict[str, Any]:
    """What a child has told, which has ended.

    Args:
        status: that it ended with.

    Raises:
        RuntimeError: it told nothing; its last words.
    """
    for line in reversed(out.splitlines()):
        if line.startswith(MARK):
            found: dict[str, Any] = json.loads(line.removeprefix(MARK))
            return found
    said = errors.strip().splitlines() or ["nothing"]
    raise RuntimeError(f"the process ended with status {status}: {said[-1]}")
