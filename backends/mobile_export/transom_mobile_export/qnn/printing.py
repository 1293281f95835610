"""Keeps the standard output clean: Qualcomm's emulator writes a line to it when it starts (QNN 2.51)."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

_turn = threading.Lock()


@contextlib.contextmanager
def to_standard_error() -> Iterator[None]:
    """Redirects the standard output to the standard error; a context manager for one thread at a time."""
    with _turn:
        try:
            kept = os.dup(1)
        except OSError:  # no standard output to keep clean
            yield
            return
        os.dup2(2, 1)
        try:
            yield
        finally:
            os.dup2(kept, 1)
            os.close(kept)
