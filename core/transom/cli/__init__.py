"""The command `transom`. Each verb has a file of its own, imported only when it is used, so that `--help` is quick.

Exit status: 0 done; 1 a bug of ours; 2 something the user can mend; 130 interrupted.
"""

from __future__ import annotations

from transom.cli.app import main

__all__ = ["main"]
