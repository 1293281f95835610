"""Ctrl-C while OpenVINO is at work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from transom_openvino_cpu.interrupts import held


@held()
def interrupted(times: int, done: list[int], error: Exception | None = None) -> None:
    for time in range(times):
        signal.raise_signal(signal.SIGINT)
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


@pytest.mark.skipif(sys.platform != "linux", reason="sigaltstack(2) of Linux")
def test_a_model_that_was_closed_on_another_thread_leaves_ctrl_c_as_it_was() -> None:
    """OpenVINO frees the stack that it gave the main thread for signals; Python's handler would run on it."""
    code = """
import signal, tempfile, threading
from pathlib import Path

import numpy as np

from transom import hardware
from transom.contract import Artifact
from transom.testing.models import tiny_decoder
from transom_openvino_cpu import OpenVinoCpu

folder, backend = Path(tempfile.mkdtemp()), OpenVinoCpu()
device = next(d for d in hardware.probe_devices() if d.kind == "cpu")
made = backend.compile(tiny_decoder(np.random.default_rng(0)), device, {}, lambda stage, share: None)
for name, content in made.files.items():
    (folder / name).write_bytes(content)
artifact = Artifact({name: folder / name for name in made.files}, made.requires)
sessions = [backend.load(artifact, device, {}, folder)]

def close() -> None:
    sessions.pop().close()

thread = threading.Thread(target=close)
thread.start()
thread.join()
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""
    environment = {**os.environ, "TRANSOM_NATIVE": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr
