"""Keeps a thread's alternate signal stack while OpenVINO opens or closes a model.

OpenVINO 2026.4 on Linux replaces the signal stack of the thread that opens a model, and frees the new one on the thread
that closes it. After a close on another thread, Ctrl-C would end the process with a segmentation fault.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator


class _Stack(ctypes.Structure):
    """stack_t of sigaltstack(2)."""

    _fields_ = (("place", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextlib.contextmanager
def signal_stack_kept() -> Iterator[None]:
    """Restores the thread's signal stack at the end of the block."""
    if sys.platform != "linux":
        yield
        return
    libc, own = ctypes.CDLL(None), _Stack()
    libc.sigaltstack(None, ctypes.byref(own))
    try:
        yield
    finally:
        libc.sigaltstack(ctypes.byref(own), None)
