"""Ctrl-C while OpenVINO is at work."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from transom_openvino_cpu.interrupts import held


@held()
def interrupted(times: int, done: list[int], error: Exception | None = None) -> None:
    """A Ctrl-C as Python hands it to its handler. A real one would run on the stack for signals of this process, which
    engines that ran before in it may have left unusable."""
    for time in range(times):
        handler = signal.getsignal(signal.SIGINT)
        assert callable(handler)
        handler(signal.SIGINT, None)
        done.append(time)
    if error is not None:
        raise error


def test_an_interrupt_waits_for_the_end() -> None:
    handler, done = signal.getsignal(signal.SIGINT), list[int]()
    with pytest.raises(KeyboardInterrupt):
        interrupted(1, done)
    assert done == [0]
    assert signal.getsignal(signal.SIGINT) is handler


def test_an_interrupt_comes_before_an_error() -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupted(1, [], RuntimeError("cannot open"))


def test_without_an_interrupt_an_error_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="cannot open"):
        interrupted(0, [], RuntimeError("cannot open"))


def test_a_second_interrupt_is_not_held() -> None:
    done: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        interrupted(3, done)
    assert done == [0]


def test_nothing_is_held_in_another_thread() -> None:
    handler, seen = signal.getsignal(signal.SIGINT), []

    def inside() -> None:
        with held():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [handler]


def test_an_interrupted_import_of_openvino_is_whole_and_the_interrupt_arrives() -> None:
    code = """
import builtins, signal
from transom_openvino_cpu.engine import openvino

plain = builtins.__import__

def interrupted(name, *rest, **more):
    if name.startswith("openvino._pyopenvino"):
        builtins.__import__ = plain
        signal.raise_signal(signal.SIGINT)
    return plain(name, *rest, **more)

builtins.__import__ = interrupted
try:
    openvino()
except KeyboardInterrupt:
    assert builtins.__import__ is plain
    print(openvino().Core is not None)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("True\n", "")
