"""Calls to backends, which are third-party code: any exception becomes an EngineError that names the backend."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

from transom.contract import Artifact, Backend, Cancelled, Device, Options, Session, Verdict
from transom.errors import EngineError, TransomError, option
from transom.preparation.child import GRACE_SECONDS, HEARTBEAT_SECONDS, late_fix, silence_limit

if TYPE_CHECKING:
    from transom.preparation.compiled import CompiledModel

T = TypeVar("T")

_given_up: set[Future[Session]] = set()
"""Loads that run on, and that `open_session_beside` no longer waits for."""


class LoadTimedOut(EngineError):
    """A backend did not finish loading a compiled model within the time limit."""


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


def open_session_beside(
    backend: Backend, model: CompiledModel, device: Device, options: Options, beside: Callable[[], T]
) -> tuple[Session, T]:
    """Load a compiled model in a thread of its own, while `beside` runs in this one.

    A thread can be left behind, also in native code that never returns. A session that it makes afterwards is closed.
    Native code that holds Python's global lock cannot be left: it stops this thread too.

    Raises:
        LoadTimedOut: the load took longer than `silence_limit`.
        KeyboardInterrupt: Ctrl-C was pressed. The load has `GRACE_SECONDS` to end, so that a process that ends now does
            not end in the middle of native code; a second Ctrl-C skips them.
        Exception: as `open_session` or `beside` raised it.
    """
    limit, opening = silence_limit(), Future[Session]()
    start = time.monotonic()
    work = (opening, lambda: open_session(backend, model, device, options))
    thread = threading.Thread(target=_resolve, args=work, daemon=True, name="transom-load")
    failed: Exception | None = None
    try:
        thread.start()
        try:
            made = beside()
        except Exception as error:  # noqa: BLE001  raised below, when the load has ended
            failed = error
        ended = _ends(opening, start + limit)
    except BaseException:
        try:
            _ends(opening, time.monotonic() + GRACE_SECONDS)
        finally:
            _give_up(opening)
        raise
    if not ended:
        _give_up(opening)
        late = f"The backend {backend.name} did not finish loading this model on {device.id} within {limit:g} s"
        raise LoadTimedOut(late, late_fix())
    if failed is not None:
        _give_up(opening)
        raise failed
    return opening.result(), made


def loads_run_on() -> bool:
    """Whether a load that was given up still runs in its thread."""
    return bool(_given_up)


def _resolve(opening: Future[Session], call: Callable[[], Session]) -> None:
    try:
        session = call()
    except BaseException as error:  # noqa: BLE001  raised in the thread that waits
        opening.set_exception(error)
    else:
        opening.set_result(session)


def _ends(opening: Future[Session], deadline: float) -> bool:
    """Wait for the end of a load, at most until a time of `time.monotonic`. Returns whether it has ended."""
    while not opening.done():
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        with contextlib.suppress(TimeoutError):  # in short waits: Windows delays Ctrl-C until the end of a wait
            opening.exception(timeout=min(left, HEARTBEAT_SECONDS))
    return True


def _give_up(opening: Future[Session]) -> None:
    """Wait no longer for a load. Its session is closed, now or when there is one."""

    def close(ended: Future[Session]) -> None:
        if ended.exception() is None:
            with contextlib.suppress(Exception):  # nobody is left to whom it could be reported
                ended.result().close()
        _given_up.discard(ended)

    _given_up.add(opening)
    opening.add_done_callback(close)


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
