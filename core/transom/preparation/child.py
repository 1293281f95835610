"""Running a job in a child process, so that whatever a vendor's library does to the process becomes a result.

`run_in_child("package.module:function", payload)` starts a fresh interpreter (no fork, no import of the caller's
`__main__`), calls `function(payload, progress)` there, and brings back its value; or an abort, an illegal instruction,
an exit, a hang or an exception, with the last lines of what it said. Errors made for people come back whole.

How the two processes talk: the request is one JSON line on the child's standard input, which then stays open; "cancel"
on it asks the child to stop, its end says that the parent is gone. Answers are JSON lines on what was the child's
standard output at its start; from then on everything that prints there reaches standard error instead. Each line
carries a token, so that a library which printed before that cannot be mistaken for an answer.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import math
import os
import queue
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any, Literal, NoReturn

from transom.contract import Cancelled
from transom.errors import TransomError

if TYPE_CHECKING:
    from transom.contract import Progress

HEARTBEAT_SECONDS = 0.25
GRACE_SECONDS = 3.0
"""How long a child that was asked to stop may take before it is killed."""
EXIT_SECONDS = 5.0
"""How long a child that has answered may take to end."""

_TAIL_BYTES = 64 << 10
_TAIL_LINES = 40
_THROTTLE_SECONDS = 0.05
_SIGNALS = {
    "SIGILL": "an instruction that this processor does not have",
    "SIGSEGV": "an invalid memory access in native code",
    "SIGBUS": "a memory access that failed, as when a mapped file is cut short or shared memory is full",
    "SIGABRT": "native code gave up",
    "SIGFPE": "an arithmetic error in native code",
    "SIGKILL": "from outside, often because memory ran out",
    "SIGTERM": "from outside",
}
_WINDOWS_STATUS = {
    0xC0000005: "SIGSEGV",
    0xC000001D: "SIGILL",
    0xC0000094: "SIGFPE",
    0xC00000FD: "SIGSEGV",
    0xC0000374: "SIGABRT",
    0xC0000409: "SIGABRT",
}

Kind = Literal["signal", "exit", "exception", "timeout", "cancelled"]


class ChildFailed(TransomError):
    """A job in a child process failed in a way that is no `TransomError` of its own; `trial` has the particulars."""

    trial: TrialError | None = None

    def __init__(self, cause: str, fix: str, details: tuple[str, ...], trial: TrialError) -> None:
        super().__init__(cause, fix, details)
        self.trial = trial


@dataclass(frozen=True)
class TrialError:
    """Why there is no value."""

    kind: Kind
    """`"signal"`: native code or the system killed it. `"exit"`: it ended without an answer. `"exception"`: it raised.
    `"timeout"`: it was killed. `"cancelled"`: it raised `Cancelled` without being asked to."""
    message: str
    """One phrase for people: "killed by SIGILL: an instruction that this processor does not have"."""
    signal: str = ""
    """`"SIGSEGV"`."""
    exit_code: int | None = None
    exception: str = ""
    """The class: `"builtins.OSError"`."""
    errno: int | None = None
    """Of an OSError: a full disk is told from others by it."""
    traceback: str = ""
    stderr: str = ""
    """The last lines that the child wrote, standard output included."""
    transported: Mapping[str, Any] | None = field(default=None, repr=False)
    """A `TransomError` in JSON types."""

    def to_exception(self, job: str = "The job") -> Exception:
        """What to raise for it: the child's `TransomError` as it was, `Cancelled`, or a `ChildFailed`.

        Args:
            job: begins the sentence, as in "Compiling for openvino_cpu".
        """
        if self.transported is not None:
            return _rebuild(self.transported)
        if self.kind == "cancelled":
            return Cancelled(self.message)
        said = (self.traceback or self.stderr).strip().splitlines()[-8:]
        return ChildFailed(f"{job} failed in its child process: {self.message}", "", tuple(said), self)


@dataclass(frozen=True)
class TrialResult:
    """What came of a job: a value (JSON types), or an error."""

    value: Any
    error: TrialError | None
    seconds: float
    """From starting the child to its end."""

    @property
    def ok(self) -> bool:
        return self.error is None

    def unwrap(self, job: str = "The job") -> Any:
        """The value. Raises `error.to_exception(job)` when there is none."""
        if self.error is not None:
            raise self.error.to_exception(job)
        return self.value


def run_in_child(
    entry: str, payload: Mapping[str, Any], *, timeout: float | None = None, progress: Progress | None = None
) -> TrialResult:
    """Call `entry(payload, progress)` in a child process.

    The child has this process's environment, `sys.path` and working directory. It never outlives this process.

    Args:
        entry: "module:function"; the function returns JSON types.
        payload: JSON types. Large data goes through files that the payload names.
        timeout: seconds until the child is killed; None: no limit.
        progress: gets what the child reports, and the last report again four times a second, so that it can stop a
            child that reports nothing. What it raises (`Cancelled`) comes out of this call unchanged, after the child
            has been asked to stop, given `GRACE_SECONDS` for that, and killed.

    Raises ValueError for an entry of another form, TypeError for a payload that is not JSON, what `progress` raises,
    and KeyboardInterrupt. Everything that happens in the child is in the result.
    """
    module, _, function = entry.partition(":")
    if not module or not function:
        raise ValueError(f'not "module:function": {entry!r}')
    token = secrets.token_hex(8)
    request = {"token": token, "parent": os.getpid(), "module": module, "function": function, "payload": payload}
    line = json.dumps(request).encode() + b"\n"
    start = time.monotonic()
    try:
        child = _Child(line, token.encode())
    except OSError as error:
        message = f"no child process can be started: {error.strerror or error}"
        failure = TrialError("exception", message, exception="builtins.OSError", errno=error.errno)
        return TrialResult(None, failure, time.monotonic() - start)
    try:
        answer = child.listen(None if timeout is None else start + timeout, progress)
        if answer is None:
            child.kill()
            failure = TrialError("timeout", f"it did not end within {timeout:g} s", stderr=child.stderr())
            return TrialResult(None, failure, time.monotonic() - start)
        child.wait(EXIT_SECONDS)
    except BaseException:
        child.stop()
        raise
    finally:
        child.close()
    seconds = time.monotonic() - start
    if "value" in answer:
        return TrialResult(answer["value"], None, seconds)
    return TrialResult(None, _failure(answer, child.process.returncode, child.stderr()), seconds)


class _Child:
    """The parent's end: the process, and threads that read and write its pipes so that neither side can block."""

    def __init__(self, request: bytes, token: bytes) -> None:
        if not sys.executable or getattr(sys, "frozen", False):
            raise OSError("this program has no Python interpreter to start one with")
        path = [entry for entry in sys.path if isinstance(entry, str)]
        start = f"import sys; sys.path[:] = {path!r}; from transom.preparation.child import child; child()"
        self.process: subprocess.Popen[bytes] = subprocess.Popen(
            [sys.executable, "-c", start],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C reaches this process alone, which then stops the child
            creationflags=_windows_flags(),
        )
        self._token = token
        self._answers: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._tail = bytearray()
        self._tail_lock = threading.Lock()
        self._input = _piped(self.process.stdin)
        self._threads = [
            threading.Thread(target=work, args=arguments, daemon=True, name="transom-trial")
            for work, arguments in (
                (self._write, (request,)),
                (self._read_answers, (_piped(self.process.stdout),)),
                (self._read_errors, (_piped(self.process.stderr),)),
            )
        ]
        for thread in self._threads:
            thread.start()

    def listen(self, deadline: float | None, progress: Progress | None) -> dict[str, Any] | None:
        """The child's answer, an empty one when it ended without, None when the time is up."""
        last: tuple[str, float | None] = ("start", None)
        while True:
            left = math.inf if deadline is None else deadline - time.monotonic()
            if left <= 0:
                return None
            try:
                answer = self._answers.get(timeout=min(left, HEARTBEAT_SECONDS))
            except queue.Empty:
                answer = {"progress": last}
            if answer is None:  # its end of the pipe is closed
                try:
                    self.process.wait(timeout=min(left, HEARTBEAT_SECONDS))
                except subprocess.TimeoutExpired:
                    self._answers.put(None)  # a library closed the pipe: all that is left is to wait for the end
                    answer = {"progress": last}
                else:
                    return {}
            if "progress" not in answer:
                return answer
            stage, share = answer["progress"]
            last = (stage, share)
            if progress is not None:
                progress(*last)

    def wait(self, seconds: float) -> None:
        """Let the child end by itself; kill it after that time."""
        try:
            self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.kill()

    def stop(self) -> None:
        """Ask the child to stop, so that it can clean up, and kill it when it does not."""
        if self.process.poll() is None:
            threading.Thread(target=self._write, args=(b"cancel\n",), daemon=True).start()
            self.wait(GRACE_SECONDS)

    def kill(self) -> None:
        """Kill the child and the processes it started."""
        if self.process.returncode is not None:
            return
        if sys.platform == "win32":
            self.process.kill()
        else:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:  # it has not become the leader of its group yet
                self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """End everything that is left; the child is dead afterwards."""
        self.kill()
        for thread in self._threads:
            thread.join(timeout=1.0)  # a process that the child started may hold the pipe for longer
        with contextlib.suppress(OSError):  # what was still to be sent has nobody to read it
            self._input.close()

    def stderr(self) -> str:
        for thread in self._threads:
            thread.join(timeout=1.0)
        with self._tail_lock:
            text = bytes(self._tail).decode("utf-8", "replace")
        return "\n".join(text.splitlines()[-_TAIL_LINES:])

    def _write(self, data: bytes) -> None:
        try:
            self._input.write(data)
            self._input.flush()
        except (OSError, ValueError):
            return  # the child is dead, which its exit status will tell

    def _read_answers(self, pipe: IO[bytes]) -> None:
        with pipe:
            for line in pipe:
                if line.startswith(self._token):
                    self._answers.put(json.loads(line[len(self._token) :]))
                else:
                    self._keep(line)
        self._answers.put(None)

    def _read_errors(self, pipe: IO[bytes]) -> None:
        with pipe:
            while piece := os.read(pipe.fileno(), 1 << 16):
                self._keep(piece)

    def _keep(self, data: bytes) -> None:
        with self._tail_lock:
            self._tail += data
            del self._tail[:-_TAIL_BYTES]


def _piped(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


def _windows_flags() -> int:
    if sys.platform == "win32":
        return subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW
    return 0


def _failure(answer: Mapping[str, Any], status: int, stderr: str) -> TrialError:
    """The error of a child that sent no value."""
    if answer:
        return TrialError(**answer, stderr=stderr)
    name = _WINDOWS_STATUS.get(status, "")
    if status < 0:
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = f"signal {-status}"
    if name:
        hint = f": {_SIGNALS[name]}" if name in _SIGNALS else ""
        return TrialError("signal", f"killed by {name}{hint}", signal=name, stderr=stderr)
    return TrialError("exit", f"it exited with status {status} before it was done", exit_code=status, stderr=stderr)


def _rebuild(record: Mapping[str, Any]) -> TransomError:
    """The error that `_describe` described; of its own class where that can be imported here."""
    kind: type[TransomError] = TransomError
    try:
        found: object = importlib.import_module(record["module"])
        for name in record["name"].split("."):
            found = getattr(found, name)
        if isinstance(found, type) and issubclass(found, TransomError):
            kind = found
    except (ImportError, AttributeError):
        pass  # made by a module that only the child could see
    error = kind.__new__(kind)
    TransomError.__init__(error, record["cause"], record["fix"], record["details"])
    vars(error).update(record["attributes"])
    return error


# --- the child's end ---


class _Link:
    """The child's end of the conversation."""

    def __init__(self) -> None:
        # Answers go to what is standard output now. From here on whatever prints, native code included, reaches
        # standard error, and whatever reads standard input finds nothing.
        self._answers = os.dup(1)
        os.dup2(2, 1)
        self._requests = os.dup(0)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        self._lock = threading.Lock()
        self._token = b""
        self._cancelled = threading.Event()
        self._last: tuple[str, float] = ("", 0.0)

    def request(self) -> dict[str, Any]:
        """The request; from then on watch for "cancel" and for the parent's end."""
        data = bytearray()
        while b"\n" not in data:
            piece = os.read(self._requests, 1 << 16)
            if not piece:
                _die()
            data += piece
        line, _, rest = bytes(data).partition(b"\n")
        request: dict[str, Any] = json.loads(line)
        self._token = str(request["token"]).encode()
        threading.Thread(target=self._watch, args=(rest,), daemon=True, name="transom-parent").start()
        return request

    def _watch(self, data: bytes) -> None:
        while True:
            if b"cancel" in data:
                self._cancelled.set()
            data = os.read(self._requests, 1 << 16)
            if not data:
                _die()

    def progress(self, stage: str, share: float | None) -> None:
        """The `Progress` that the job calls."""
        if self._cancelled.is_set():
            raise Cancelled
        now = time.monotonic()
        if stage == self._last[0] and now - self._last[1] < _THROTTLE_SECONDS and share != 1.0:
            return
        self._last = (stage, now)
        self.send({"progress": [str(stage), None if share is None else float(share)]})

    def send(self, answer: Mapping[str, Any]) -> None:
        """Raises TypeError or ValueError when the answer is not JSON."""
        data = self._token + json.dumps(answer).encode() + b"\n"
        with self._lock:
            if "progress" not in answer:
                data = b"\n" + data  # should something have written half a line
            while data:
                try:
                    data = data[os.write(self._answers, data) :]
                except BrokenPipeError:
                    _die()


def child() -> None:
    """The child's main function: answer one request and end the process."""
    import faulthandler

    link = _Link()
    _die_with_the_parent()
    faulthandler.enable()
    request = link.request()
    if sys.platform != "win32" and os.getppid() != request["parent"]:
        _die()  # the parent ended before the system was told to tell
    try:
        job = getattr(importlib.import_module(request["module"]), request["function"])
        value = job(request["payload"], link.progress)
        link.send({"value": value})
    except Exception as error:  # noqa: BLE001  the parent decides what to do about it
        link.send(_describe(error))
    # An interpreter that ends in the usual way takes a large graph apart piece by piece, for a fifth of a second, and
    # runs what engines do at their end.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _describe(error: Exception) -> dict[str, Any]:
    """An exception as the fields of a `TrialError`."""
    import traceback

    if isinstance(error, Cancelled):
        return {"kind": "cancelled", "message": str(error) or "cancelled"}
    kind = type(error)
    described: dict[str, Any] = {
        "kind": "exception",
        "message": f"{kind.__name__}: {error}" if str(error) else kind.__name__,
        "exception": f"{kind.__module__}.{kind.__qualname__}",
        "traceback": "".join(traceback.format_exception(error)),
    }
    if isinstance(error, OSError):
        described["errno"] = error.errno
    if isinstance(error, TransomError):
        described["transported"] = {
            "module": kind.__module__,
            "name": kind.__qualname__,
            "cause": error.cause,
            "fix": error.fix,
            "details": [str(line) for line in error.details],
            "attributes": {name: value for name, value in vars(error).items() if _is_extra(name, value)},
        }
        described["message"] = str(error)
    return described


def _is_extra(name: str, value: object) -> bool:
    if name in ("cause", "fix", "details"):
        return False
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _die_with_the_parent() -> None:
    """Ask the system to kill this process when its parent ends; a thread that needs the interpreter could be too late.

    Also keep a crash quiet: no core file, no dialogue.
    """
    if sys.platform == "win32":
        import ctypes

        ctypes.windll.kernel32.SetErrorMode(0x0001 | 0x0002)  # no dialogue for a critical error or a crash
        return
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(1, int(signal.SIGKILL), 0, 0, 0)  # PR_SET_PDEATHSIG


def _die() -> NoReturn:
    """The parent is gone: nobody wants an answer, and the processes that this one started are of no use either."""
    if sys.platform != "win32":
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)
