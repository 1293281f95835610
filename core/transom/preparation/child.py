"""Runs a job in a child process, so that a crash in a vendor's library becomes a result.

`run_in_child("package.module:function", payload)` starts a fresh interpreter (no fork, no import of the caller's
`__main__`), calls `function(payload, progress)` there, and returns its value, or how it failed: an abort, an illegal
instruction, an exit, a hang or an exception, with the last lines of its output. A `TransomError` is returned complete.

The protocol: the request is one JSON line on the child's standard input, which stays open. A later "cancel" asks the
child to stop; end of file means that the parent is gone. Answers are JSON lines on the standard output that the child
was started with; the child redirects everything else that is printed there to standard error. Each line starts with a
token, so that output which a library printed before the redirection is not taken for an answer.
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
from transom.errors import OptionError, TransomError, name_options, option, option_names

if TYPE_CHECKING:
    from transom.contract import Progress

HEARTBEAT_SECONDS = 0.25
GRACE_SECONDS = 3.0
"""Time that a child has to stop after it was asked to; then it is killed."""
SILENCE_SECONDS = 3600.0
"""How long a child without a timeout may report nothing, unless `TRANSOM_TIME_LIMIT` says otherwise."""
EXIT_SECONDS = 5.0
"""Time that a child has to end after it has answered."""

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
    """A job in a child process failed without raising a `TransomError`; `failure` has the details."""

    failure: ChildFailure | None = None

    def __init__(self, cause: str, fix: str, details: tuple[str, ...], failure: ChildFailure) -> None:
        super().__init__(cause, fix, details)
        self.failure = failure


@dataclass(frozen=True)
class ChildFailure:
    """How a job failed."""

    kind: Kind
    """`"signal"`: a signal killed it. `"exit"`: it ended without an answer. `"exception"`: it raised. `"timeout"`: it
    was killed at the timeout. `"cancelled"`: it raised `Cancelled` without having been asked to stop."""
    message: str
    """A phrase such as "killed by SIGILL: an instruction that this processor does not have"."""
    signal: str = ""
    """Name of the signal: `"SIGSEGV"`."""
    exit_code: int | None = None
    exception: str = ""
    """Class of the exception: `"builtins.OSError"`."""
    errno: int | None = None
    """Error number of an OSError, by which a full disk is recognized."""
    traceback: str = ""
    stderr: str = ""
    """The last lines of the child's output, standard output included."""
    transported: Mapping[str, Any] | None = field(default=None, repr=False)
    """The child's `TransomError` in JSON types."""

    def to_exception(self, job: str = "The job") -> Exception:
        """The exception to raise: the child's own `TransomError`, `Cancelled`, or a `ChildFailed`.

        Args:
            job: subject of the sentence, such as "Compiling for openvino_cpu".
        """
        if self.transported is not None:
            return _rebuild(self.transported)
        if self.kind == "cancelled":
            return Cancelled(self.message)
        output = (self.traceback or self.stderr).strip().splitlines()[-8:]
        fix = late_fix() if self.kind == "timeout" else ""
        return ChildFailed(f"{job} failed in its child process: {self.message}", fix, tuple(output), self)


@dataclass(frozen=True)
class ChildResult:
    """The outcome of a job: a value (JSON types), or a failure."""

    value: Any
    failure: ChildFailure | None
    seconds: float
    """Seconds from the start of the child to its end."""

    @property
    def ok(self) -> bool:
        return self.failure is None

    def unwrap(self, job: str = "The job") -> Any:
        """The value. Raises `failure.to_exception(job)` where there is none."""
        if self.failure is not None:
            raise self.failure.to_exception(job)
        return self.value


def run_in_child(
    entry: str, payload: Mapping[str, Any], *, timeout: float | None = None, progress: Progress | None = None
) -> ChildResult:
    """Call `entry(payload, progress)` in a child process.

    The child has this process's environment, `sys.path` and working directory. It never outlives this process.

    Args:
        entry: "module:function"; the function returns JSON types.
        payload: JSON types. Large data is passed in files that the payload names.
        timeout: seconds until the child is killed; None: when it has reported no progress for the seconds of
            `TRANSOM_TIME_LIMIT` (0: no limit), else `SILENCE_SECONDS`.
        progress: gets the child's reports, and the last one again four times a second, so that it can stop a child that
            reports nothing. If it raises (`Cancelled`), the child is asked to stop, killed after `GRACE_SECONDS`, and
            the exception is raised unchanged.

    Raises:
        ValueError: `entry` has another form.
        TypeError: `payload` is not JSON.
        OptionError: `TRANSOM_TIME_LIMIT` is not a number of seconds.
        KeyboardInterrupt, Cancelled: as `progress` raised them. Failures of the child are in the result.
    """
    module, _, function = entry.partition(":")
    if not module or not function:
        raise ValueError(f'not "module:function": {entry!r}')
    token = secrets.token_hex(8)
    request = {"token": token, "parent": os.getpid(), "module": module, "function": function, "payload": payload}
    request |= {"option_names": option_names()}
    line = json.dumps(request).encode() + b"\n"
    silence = silence_limit() if timeout is None else math.inf
    start = time.monotonic()
    try:
        child = _Child(line, token.encode())
    except OSError as error:
        message = f"no child process can be started: {error.strerror or error}"
        failure = ChildFailure("exception", message, exception="builtins.OSError", errno=error.errno)
        return ChildResult(None, failure, time.monotonic() - start)
    try:
        answer = child.listen(None if timeout is None else start + timeout, silence, progress)
        if answer is None:
            child.kill()
            end = f"end within {timeout:g} s" if timeout is not None else f"report any progress for {silence:g} s"
            late = f"it did not {end}"
            failure = ChildFailure("timeout", late, stderr=child.stderr())
            return ChildResult(None, failure, time.monotonic() - start)
        child.wait(EXIT_SECONDS)
    except BaseException:
        child.stop()
        raise
    finally:
        child.close()
    seconds = time.monotonic() - start
    if "value" in answer:
        return ChildResult(answer["value"], None, seconds)
    return ChildResult(None, _failure(answer, child.process.returncode, child.stderr()), seconds)


def silence_limit() -> float:
    """Seconds that a child process may report nothing, and that a backend may take to load a model in this process.

    Raises:
        OptionError: `TRANSOM_TIME_LIMIT` is not a number of seconds.
    """
    text = os.environ.get("TRANSOM_TIME_LIMIT", "").strip()
    if not text:
        return SILENCE_SECONDS
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < math.inf:
        raise OptionError(f'TRANSOM_TIME_LIMIT is "{text}", not a number of seconds', "Give seconds, or 0 for no limit")
    return value or math.inf


def late_fix() -> str:
    """What the user can do about a backend that exceeded `silence_limit`."""
    return f"Choose another with {option('backend')}, or set TRANSOM_TIME_LIMIT to more seconds"


class _Child:
    """The parent's side: the process, and threads that read and write its pipes so that neither side blocks."""

    def __init__(self, request: bytes, token: bytes) -> None:
        if not sys.executable or getattr(sys, "frozen", False):
            raise OSError("this program has no Python interpreter to start one with")
        path = [entry for entry in sys.path if isinstance(entry, str)]
        start = f"import sys; sys.path[:] = {path!r}; from transom.preparation.child import main; main()"
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
            threading.Thread(target=work, args=arguments, daemon=True, name="transom-child")
            for work, arguments in (
                (self._write, (request,)),
                (self._read_answers, (_piped(self.process.stdout),)),
                (self._read_errors, (_piped(self.process.stderr),)),
            )
        ]
        for thread in self._threads:
            thread.start()

    def listen(self, deadline: float | None, silence: float, progress: Progress | None) -> dict[str, Any] | None:
        """The child's answer; empty when the child ended without one, None when the time is up.

        Args:
            silence: seconds that may pass without a report.
        """
        last: tuple[str, float | None] = ("start", None)
        heard = time.monotonic()
        while True:
            left = min(math.inf if deadline is None else deadline, heard + silence) - time.monotonic()
            if left <= 0:
                return None
            try:
                answer = self._answers.get(timeout=min(left, HEARTBEAT_SECONDS))
            except queue.Empty:
                answer = {"progress": last}
            else:
                heard = time.monotonic() if answer is not None else heard
            if answer is None:  # the child has closed its end of the pipe
                try:
                    self.process.wait(timeout=min(left, HEARTBEAT_SECONDS))
                except subprocess.TimeoutExpired:
                    self._answers.put(None)  # a library closed the pipe: wait for the child to end
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
        """Wait for the child to end; kill it after that time."""
        try:
            self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.kill()

    def stop(self) -> None:
        """Ask the child to stop, so that it can clean up; kill it if it does not."""
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
            except ProcessLookupError:  # it does not lead its process group yet
                self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """Kill the child if it still runs, and release the threads and pipes."""
        self.kill()
        for thread in self._threads:
            thread.join(timeout=1.0)  # a process that the child started may hold the pipe for longer
        with contextlib.suppress(OSError):  # nothing reads the data that is still buffered
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
            return  # the child is dead; its exit status is reported

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


def _failure(answer: Mapping[str, Any], status: int, stderr: str) -> ChildFailure:
    """The failure of a child that sent no value."""
    if answer:
        return ChildFailure(**answer, stderr=stderr)
    name = _WINDOWS_STATUS.get(status, "")
    if status < 0:
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = f"signal {-status}"
    if name:
        hint = f": {_SIGNALS[name]}" if name in _SIGNALS else ""
        return ChildFailure("signal", f"killed by {name}{hint}", signal=name, stderr=stderr)
    return ChildFailure("exit", f"it exited with status {status} before it was done", exit_code=status, stderr=stderr)


def _rebuild(record: Mapping[str, Any]) -> TransomError:
    """The error that `_describe` recorded; its base class TransomError where its own cannot be imported here."""
    kind: type[TransomError] = TransomError
    try:
        found: object = importlib.import_module(record["module"])
        for name in record["name"].split("."):
            found = getattr(found, name)
        if isinstance(found, type) and issubclass(found, TransomError):
            kind = found
    except (ImportError, AttributeError):
        pass  # its module is importable in the child only
    error = kind.__new__(kind)
    TransomError.__init__(error, record["cause"], record["fix"], record["details"])
    vars(error).update(record["attributes"])
    return error


# --- in the child process ---


class _ParentLink:
    """The connection to the parent."""

    def __init__(self) -> None:
        # Answers go to the present standard output. From here on everything that prints, native code included, writes
        # to standard error, and everything that reads standard input finds it empty.
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
        """Read the request, then watch for "cancel" and for the end of the parent."""
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
        """Raises TypeError or ValueError for an answer that is not JSON."""
        data = self._token + json.dumps(answer).encode() + b"\n"
        with self._lock:
            if "progress" not in answer:
                data = b"\n" + data  # in case something has written half a line
            while data:
                try:
                    data = data[os.write(self._answers, data) :]
                except BrokenPipeError:
                    _die()


def main() -> None:
    """The main function of the child: answer one request and end the process."""
    import faulthandler

    link = _ParentLink()
    _die_with_the_parent()
    faulthandler.enable()
    request = link.request()
    if sys.platform != "win32" and os.getppid() != request["parent"]:
        _die()  # the parent ended before `_die_with_the_parent` took effect
    name_options(request["option_names"])
    try:
        job = getattr(importlib.import_module(request["module"]), request["function"])
        value = job(request["payload"], link.progress)
        link.send({"value": value})
    except Exception as error:  # noqa: BLE001  the parent decides what to do about it
        link.send(_describe(error))
    # A normal exit of the interpreter frees a large graph object by object, which takes a fifth of a second, and runs
    # the shutdown code of engines.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _describe(error: Exception) -> dict[str, Any]:
    """The fields of a `ChildFailure` for an exception."""
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
    """Have the system kill this process when its parent ends; native code could keep a Python thread from doing it.

    Also turn off core files and error dialogues.
    """
    if sys.platform == "win32":
        import ctypes

        ctypes.windll.kernel32.SetErrorMode(0x0001 | 0x0002)  # SEM_FAILCRITICALERRORS | SEM_NOGPFAULTERRORBOX
        return
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(1, int(signal.SIGKILL), 0, 0, 0)  # PR_SET_PDEATHSIG


def _die() -> NoReturn:
    """End this process and the processes that it started, because the parent is gone."""
    if sys.platform != "win32":
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)
