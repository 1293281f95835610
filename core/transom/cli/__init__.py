"""The command `transom`. Each verb has a file of its own, imported only when it is used, so that `--help` is quick.

Exit status: 0 success; 1 a bug in Transom; 2 an error that the user can fix; 130 interrupted.

Slow imports happen inside `main`, which handles Ctrl-C.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    try:
        from transom.cli.app import run

        status = run(arguments)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        status = 130
    sys.exit(status)
