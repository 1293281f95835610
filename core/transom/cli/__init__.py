"""The command `transom`. Each verb has a file of its own, imported only when it is used, so that `--help` is quick.

Exit status: 0 done; 1 a bug of ours; 2 something the user can mend; 130 interrupted.

What takes time to import is imported in `main`, which catches a Ctrl-C.
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
