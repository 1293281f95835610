"""The command `transom`. Each verb has a file of its own, imported only when it is used, so that `--help` is quick.

Exit status: 0 success; 1 a bug in Transom; 2 an error that the user can fix; 130 interrupted.

Slow imports happen inside `main`, which handles Ctrl-C.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

__all__ = ["main"]


def _stdout_closed() -> bool:
    """Whether the process was started without standard output.

    Standard streams that are closed are replaced by the null device. Otherwise the next file that is opened, such as a
    model, would get their numbers, and libraries would write their messages into it.
    """
    closed = sys.stdout is None
    if closed or sys.stderr is None or sys.stdin is None:
        import os

        while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(number)
        sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115  for the whole run
        sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    return closed


def _end(status: int) -> NoReturn:
    """Exit, also if a load that was given up is still in native code, whose shutdown would wait for it or crash."""
    calls = sys.modules.get("transom.preparation.plugin_calls")
    if calls is not None and calls.loads_run_on():
        import atexit
        import os

        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    try:
        if _stdout_closed():
            print("Error: Standard output is closed, so there is nowhere to print to. Leave out >&-, or discard the "
                  "output with >/dev/null.", file=sys.stderr)  # fmt: skip
            sys.exit(2)
        from transom.cli.app import run

        status = run(arguments, ends=True)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        status = 130
    _end(status)
