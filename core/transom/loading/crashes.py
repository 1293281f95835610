"""Remembers a backend that ended the process, which no `except` can catch, so that the next load does not repeat it.

While models are open, `running/<unique>/` in the cache, locked by this process, holds the file `fault`, into which
Python's faulthandler writes if native code crashes, and for each model a file of one byte that is 1 while its backend
opens it, runs a step or closes it. `collect` reads the folders of processes that are gone. A process that was killed
from outside leaves no fault and is not blamed on the model, nor is a crash of the program's own code in another thread.

A program that has enabled faulthandler itself keeps it; its crashes are not remembered.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import re
import threading
import weakref
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO

from transom.artifacts.files import FolderLock, delete, is_left_over, lock_folder, make_private, unique

if TYPE_CHECKING:
    from transom.artifacts import Cache

FOLDER = "running"
STORE = "crashed_steps"
FAULT = "fault"
SIGNALS = {
    "Segmentation fault": "SIGSEGV",
    "Aborted": "SIGABRT",
    "Bus error": "SIGBUS",
    "Illegal instruction": "SIGILL",
    "Floating-point exception": "SIGFPE",
    "Floating point exception": "SIGFPE",
}
"""The signals of faulthandler, by the words that it writes."""
_OWN = re.compile(
    r'File ".*[/\\](generation[/\\](engine|model)\.py"|preparation[/\\]plugin_calls\.py", line \d+ in guarded)'
)
"""A frame that calls the backend."""

_log = logging.getLogger("transom.loading")
_guard = threading.Lock()
_open_folders: weakref.WeakValueDictionary[Path, _Folder] = weakref.WeakValueDictionary()
"""The folder of this process, by the root of the cache: at most one, as there is one faulthandler. The open models keep
it."""


def watch(cache: Cache, failure_key: str, cause: str) -> AbstractContextManager[None]:
    """A context that marks the calls of a backend for a model of this process. `release` ends it.

    Args:
        failure_key: `Job.failure_key`.
        cause: how the failure is described, with `{signal}` for the signal's name.

    Nothing is marked where the cache cannot be written, or where the program uses faulthandler itself.
    """
    with _guard:
        folder = _open_folders.get(cache.root)
        try:
            if folder is None or not folder.usable():
                if faulthandler.is_enabled() and not _open_folders:
                    return nullcontext()
                _open_folders.clear()
                folder = _open_folders[cache.root] = _Folder(cache.root)
            return Calls(folder, failure_key, cause)
        except OSError as error:
            _log.debug("crashes of steps are not remembered: %s", error)
            return nullcontext()


def release(context: AbstractContextManager[None]) -> None:
    """End what `watch` began, when the model is closed."""
    if isinstance(context, Calls):
        context.close()


def collect(cache: Cache) -> None:
    """Remember the crashes of processes that are gone, and remove their folders."""
    try:
        folders = [Path(entry.path) for entry in os.scandir(cache.root / FOLDER)]
    except OSError:
        return
    for folder in folders:
        if not is_left_over(folder):
            continue
        try:
            for key, cause in _crashes(folder):
                cache.remember(STORE, key, cause)
        except OSError as error:
            _log.debug("%s cannot be read: %s", folder, error)
        delete(folder)


def _crashes(folder: Path) -> list[tuple[str, str]]:
    fault = (folder / FAULT).read_text(errors="replace")
    found = re.match(r"Fatal Python error: (.+)", fault)
    signal = SIGNALS.get(found[1].strip()) if found else None
    if signal is None or not _in_a_call(fault):
        return []
    crashes = []
    for file in folder.glob("*.step"):
        running, _, cause = file.read_text(errors="replace").partition("\n")
        if running == "1" and cause:
            crashes.append((file.name.partition(".")[0], cause.replace("{signal}", signal)))
    return crashes


def _in_a_call(fault: str) -> bool:
    """Whether the thread that crashed called a backend, or belongs to native code."""
    _, here, trace = fault.partition("Current thread ")
    return not here or "<no Python frame>" in trace or bool(_OWN.search(trace.partition("\n\n")[0]))


class _Folder:
    """The folder of this process."""

    def __init__(self, root: Path) -> None:
        make_private(root / FOLDER)
        self.path = root / FOLDER / unique("process")
        self.path.mkdir(mode=0o700)
        self._owner = os.getpid()
        self._lock = lock_folder(self.path, create=True)
        self._fault = (self.path / FAULT).open("wb")
        self._remove = weakref.finalize(self, _end, self.path, self._fault, self._lock, self._owner)
        faulthandler.enable(self._fault)

    def usable(self) -> bool:
        """Whether the folder is this process's own, and still there."""
        return self._owner == os.getpid() and self._remove.alive and self.path.is_dir()


def _end(path: Path, fault: BinaryIO, lock: FolderLock | None, owner: int) -> None:
    if os.getpid() != owner:
        return  # a fork: the folder belongs to its parent
    faulthandler.disable()
    fault.close()
    if lock is not None:
        lock.release()
    delete(path)


class Calls:
    """Marks the calls for one model; entered for each, by one thread at a time."""

    def __init__(self, folder: _Folder, failure_key: str, cause: str) -> None:
        self._folder: _Folder | None = folder
        path = folder.path / f"{unique(failure_key + '.')}.step"
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)
        os.write(self._fd, b"0\n" + cause.encode())
        self._close = weakref.finalize(self, os.close, self._fd)

    def __enter__(self) -> None:
        self._mark(b"1")

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._mark(b"0")

    def _mark(self, state: bytes) -> None:
        if self._close.alive:
            os.lseek(self._fd, 0, os.SEEK_SET)
            os.write(self._fd, state)

    def close(self) -> None:
        """End it: later steps are not marked, and the folder goes with the last model."""
        self._close()
        self._folder = None
