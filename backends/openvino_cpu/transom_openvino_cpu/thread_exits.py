"""Waits until threads that ran a model have left the process, before the model is closed.

Before Python 3.13, `Thread.join` returns while the destructors of the C++ variables of the thread still run. Those of
OpenVINO 2026.4 use the models that the thread ran: a model that is closed at the same time damages the heap. A thread
that lives on after the close does no harm.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterable

MOST_SECONDS = 1.0
"""An exit takes less than a millisecond. After it, Linux may give the thread's number to another thread."""


def wait_for_exits(threads: Iterable[int]) -> None:
    """Wait for those threads that have ended for Python and not yet for the system.

    Args:
        threads: native ids, as from `threading.get_native_id`.
    """
    if sys.platform != "linux":
        return
    running = {thread.native_id for thread in threading.enumerate()}
    end = time.monotonic() + MOST_SECONDS
    for number in set(threads) - running:
        while os.path.exists(f"/proc/self/task/{number}") and time.monotonic() < end:
            time.sleep(1e-4)
