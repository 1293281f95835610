"""Calls to backends, which are third-party code: any exception becomes an EngineError that names the backend."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

from transom.contract import Artifact, Backend, Cancelled, Device, Options, Session, Verdict
from transom.errors import EngineError, TransomError, option

if TYPE_CHECKING:
    from transom.preparation.compiled import CompiledModel

T = TypeVar("T")


def guarded(backend: str, doing: str, call: Callable[[], T]) -> T:
    """Call a backend and return its result.

    Args:
        backend: name of the backend, for the message.
        doing: what it does, for the message: "loading this model".

    Raises:
        TransomError, Cancelled: as the backend raised them.
        KeyboardInterrupt: Ctrl-C was pressed during the call, even if the backend caught the exception.
        EngineError: the backend raised any other exception.
    """
    with _interrupts_noted() as interrupted:
        try:
            result = call()
        except (TransomError, Cancelled) as error:
            if interrupted:
                raise KeyboardInterrupt from error
            raise
        except (Exception, SystemExit) as error:
            if interrupted:
                raise KeyboardInterrupt from error
            what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise EngineError(
                f"The backend {backend} failed while {doing}: {what}",
                f"Choose another with {option('backend')}, or report it to the authors of {backend}",
            ) from error
    if interrupted:
        if callable(close := getattr(result, "close", None)):
            close()
        raise KeyboardInterrupt
    return result


def open_session(backend: Backend, model: CompiledModel, device: Device, options: Options) -> Session:
    """Load a compiled model. Raises as `guarded`."""
    return guarded(
        backend.name,
        "loading this model",
        lambda: backend.load(model.artifact, device, options, model.scratch),
    )


def check_artifact(backend: Backend, artifact: Artifact, device: Device) -> Verdict:
    """The backend's verdict on an artifact for a device. Raises as `guarded`."""
    return guarded(backend.name, "checking a compiled model", lambda: backend.check(artifact, device))


@contextlib.contextmanager
def temporary_files_in(folder: Path) -> Iterator[Path]:
    """Within the block, temporary files of this process and of processes that it starts go to `folder`."""
    folder.mkdir(exist_ok=True)
    saved, variable = tempfile.tempdir, os.environ.get("TMPDIR")
    tempfile.tempdir = os.environ["TMPDIR"] = str(folder)
    try:
        yield folder
    finally:
        tempfile.tempdir = saved
        if variable is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = variable


@contextlib.contextmanager
def interrupts_kept() -> Iterator[None]:
    """Raise KeyboardInterrupt for any error of the block after Ctrl-C: an interrupted import may raise ImportError."""
    with _interrupts_noted() as interrupted:
        try:
            yield
        except Exception as error:
            if interrupted and not isinstance(error, Cancelled):
                raise KeyboardInterrupt from error
            raise


@contextlib.contextmanager
def _interrupts_noted() -> Iterator[list[int]]:
    """A list that gets an entry when Ctrl-C raises KeyboardInterrupt.

    Native code may drop that exception or replace it. Only the main thread gets it; in other threads the list stays
    empty.
    """
    noted: list[int] = []
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield noted
        return
    before = previous

    def note(number: int, frame: FrameType | None) -> None:
        try:
            before(number, frame)
        except KeyboardInterrupt:
            noted.append(number)
            raise

    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        if signal.getsignal(signal.SIGINT) is note:
            signal.signal(signal.SIGINT, before)
