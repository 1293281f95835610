"""A model is closed after the threads that ran it have left the process."""

from __future__ import annotations

import os
import sys
import threading
import time

import pytest

from transom_openvino_cpu.thread_exits import wait_for_exits

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for threads in /proc")


def there(thread: int) -> bool:
    return os.path.exists(f"/proc/self/task/{thread}")


def test_threads_that_were_joined_have_ended_for_the_system_too() -> None:
    """Of Python's `join` alone that is not true before 3.13: most of these threads would still be there."""
    for _ in range(300):
        thread = threading.Thread(target=lambda: None)
        thread.start()
        number = thread.native_id or 0
        thread.join()
        wait_for_exits([number])
        assert not there(number)


def test_threads_that_run_on_are_not_waited_for() -> None:
    go = threading.Event()
    thread = threading.Thread(target=go.wait)
    thread.start()
    begin = time.monotonic()
    wait_for_exits([thread.native_id or 0, threading.get_native_id()])
    waited = time.monotonic() - begin
    go.set()
    thread.join()
    assert waited < 0.9
