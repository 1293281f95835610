"""OpenVINO gives the thread that opens a model a stack for signals, and frees it on whichever thread lets the model go.

Python runs its signal handlers on that stack, so that after a model was closed on another thread Ctrl-C would end the
process by a segmentation fault (OpenVINO 2026.4 on Linux). The thread's own stack is therefore put back at once.
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
    """After the block this thread handles signals on the stack that it did before."""
    if sys.platform != "linux":
        yield
        return
    libc, own = ctypes.CDLL(None), _Stack()
    libc.sigaltstack(None, ctypes.byref(own))
    try:
        yield
    finally:
        libc.sigaltstack(ctypes.byref(own), None)
