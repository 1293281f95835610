"""Keeps the standard output clean: Qualcomm's emulator writes a line to it when it starts (QNN 2.51)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Iterator

_turn = threading.Lock()


@contextlib.contextmanager
def to_standard_error() -> Iterator[None]:
    """While it is entered, by one thread at a time, all that is written to the standard output goes to the error."""
    if sys.platform == "win32":  # its C libraries each have buffers of their own, which nobody else can flush
        yield
        return
    with _turn:
        libc = ctypes.CDLL(None)
        libc.fflush(None)
        try:
            kept = os.dup(1)
        except OSError:  # there is none to keep clean
            yield
            return
        os.dup2(2, 1)
        try:
            yield
        finally:
            libc.fflush(None)
            os.dup2(kept, 1)
            os.close(kept)
