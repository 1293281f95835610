"""Processes for tests that are forked from one that has imported what they need, in place of fresh interpreters.

A process that compiles a model takes two seconds of processor time for its imports, a command half a second: with
hundreds of them that is most of a test run. `Popen` and `run` are those of `subprocess` for `python -c CODE …`, with
arguments, environment, folder and streams of its own. `tests/conftest.py` puts them in the place of `subprocess` where
Transom starts processes. What a test says of imports, of closed streams, of a terminal or of a parent that ends needs
fresh interpreters: its mark is `fresh_interpreters`.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import DEVNULL, PIPE, CompletedProcess, TimeoutExpired
from typing import IO, Any

__all__ = ["DEVNULL", "PIPE", "CompletedProcess", "Popen", "TimeoutExpired", "run"]

IMPORTED = (
    "numpy", "click", "jinja2", "filelock", "onnx_ir", "gguf", "transom", "transom.api", "transom.cli.app",
    "transom.cli.run", "transom.loading.loader", "transom.generation.model", "transom.sources.gguf",
    "transom.plugin_trials", "transom.preparation.pipeline", "transom.preparation.stages",
)  # fmt: skip

_address = ""
"""The socket of the process that forks; empty until it has been started. Processes that it forked know it too."""


def Popen(arguments: Sequence[str], **options: Any) -> Any:
    """Start a process: forked if it is `python -c CODE …`, else by `subprocess`."""
    forks = list(arguments[:2]) == [sys.executable, "-c"] and not options.keys() - _OPTIONS
    return _Forked(arguments, **options) if forks else subprocess.Popen(arguments, **options)


_OPTIONS = {"stdin", "stdout", "stderr", "env", "cwd", "start_new_session", "creationflags", "text"}


def run(
    arguments: Sequence[str],
    *,
    input: bytes | str | None = None,
    capture_output: bool = False,
    timeout: float | None = None,
    **options: Any,
) -> CompletedProcess[Any]:
    """What `subprocess.run` does."""
    if capture_output:
        options |= {"stdout": PIPE, "stderr": PIPE}
    if input is not None:
        options["stdin"] = PIPE
    process = Popen(arguments, **options)
    try:
        out, err = process.communicate(input, timeout=timeout)
    except TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return CompletedProcess(arguments, process.wait(), out, err)


class _Forked:
    """A process as `subprocess.Popen` gives it. It is no child of this process, but `os.getppid` in it says so."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        stdin: Any = None,
        stdout: Any = None,
        stderr: Any = None,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        start_new_session: bool = False,
        creationflags: int = 0,
        text: bool = False,
    ) -> None:
        self.args, self.returncode, self._text = list(arguments), None, text
        theirs: list[int] = []
        mine: list[IO[bytes] | None] = []
        for place, stream in enumerate((stdin, stdout, stderr)):
            if stream == PIPE:
                ends = os.pipe()
                theirs.append(ends[place > 0])
                mine.append(open(ends[place == 0], "rb" if place else "wb"))  # noqa: SIM115  until it is closed
            else:
                mine.append(None)
                theirs.append(
                    os.open(os.devnull, os.O_RDWR)
                    if stream == DEVNULL
                    else os.dup(place if stream is None else stream if isinstance(stream, int) else stream.fileno())
                )
        self.stdin, self.stdout, self.stderr = mine
        request = {
            "code": arguments[2], "arguments": list(map(str, arguments[3:])), "parent": os.getpid(),
            "environment": dict(os.environ if env is None else env), "folder": str(cwd or os.getcwd()),
            "session": start_new_session,
        }  # fmt: skip
        data = json.dumps(request).encode()
        self._channel = _connect()
        socket.send_fds(self._channel, [len(data).to_bytes(4, "little")], theirs)
        self._channel.sendall(data)
        for number in theirs:
            os.close(number)
        self.pid = _number(self._channel)

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._channel.settimeout(timeout)
            try:
                self.returncode = _number(self._channel)
            except (TimeoutError, BlockingIOError):
                raise TimeoutExpired(self.args, timeout or 0) from None
            self._channel.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def communicate(self, input: bytes | str | None = None, timeout: float | None = None) -> tuple[Any, Any]:
        """What was printed. Called again after a `TimeoutExpired`, it goes on."""
        if not hasattr(self, "_said"):
            self._said: dict[str, bytes] = {}
            data = input.encode() if isinstance(input, str) else input or b""
            work = [(self._write, (data,)), (self._read, ("stdout",)), (self._read, ("stderr",))]
            self._threads = [threading.Thread(target=f, args=a, daemon=True) for f, a in work]
            for thread in self._threads:
                thread.start()
        end = None if timeout is None else time.monotonic() + timeout
        for thread in self._threads:
            thread.join(None if end is None else max(0.0, end - time.monotonic()))
            if thread.is_alive():
                raise TimeoutExpired(self.args, timeout or 0, self._said.get("stdout"), self._said.get("stderr"))
        self.wait(None if end is None else max(0.0, end - time.monotonic()))
        said = [self._said.get(name) for name in ("stdout", "stderr")]
        return tuple(s.decode() if self._text and s is not None else s for s in said)  # type: ignore[return-value]

    def _read(self, name: str) -> None:
        stream = getattr(self, name)
        if stream is not None:
            with stream:
                self._said[name] = stream.read()

    def _write(self, data: bytes) -> None:
        # A process that ends before it has read everything breaks the pipe, which is no error here.
        if self.stdin is not None:
            with contextlib.suppress(BrokenPipeError), self.stdin:
                self.stdin.write(data)


def _connect() -> socket.socket:
    global _address
    if not _address:
        folder = tempfile.mkdtemp(prefix="forks-")
        _address = os.path.join(folder, "socket")
        here, (alive, watched) = str(Path(__file__).parent), os.pipe()
        code = f"import sys; sys.path.insert(0, {here!r}); import forked; forked.serve({_address!r}, {alive})"
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(_address)
        listening.listen(64)
        process = subprocess.Popen(
            [sys.executable, "-c", code], pass_fds=[alive], stdin=listening.fileno(), stdout=DEVNULL
        )
        listening.close()
        os.close(alive)

        def end() -> None:
            os.close(watched)
            process.wait()
            shutil.rmtree(folder, ignore_errors=True)

        atexit.register(end)
    channel = socket.socket(socket.AF_UNIX)
    channel.connect(_address)
    return channel


def _number(channel: socket.socket) -> int:
    return int.from_bytes(_exactly(channel, 4), "little", signed=True)


def _exactly(channel: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = channel.recv(size - len(data))
        if not more:
            raise EOFError("the process that forks has ended")
        data += more
    return data


def serve(address: str, alive: int) -> None:
    """Fork a process for each request, and tell how it ended, until the pipe `alive` is closed at its other end.

    Standard input is the socket that listens at `address`.
    """
    global _address
    _address = address
    for name in IMPORTED:
        importlib.import_module(name)
    _put_in_place()
    gc.freeze()  # a collection in a forked process would copy every page
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests
    ended, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    listening = socket.socket(fileno=os.dup(0))
    running: dict[int, socket.socket] = {}
    events = selectors.DefaultSelector()
    for source in (alive, ended, listening):
        events.register(source, selectors.EVENT_READ)
    while True:
        ready = {key.fileobj for key, _ in events.select()}
        if alive in ready:
            return
        if ended in ready:
            os.read(ended, 4096)
            _reap(running)
        if listening in ready:
            channel, _ = listening.accept()
            header, streams, _, _ = socket.recv_fds(channel, 4, 3)
            request = json.loads(_exactly(channel, int.from_bytes(header, "little")))
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                events.close()
                for other in (channel, listening, *running.values()):
                    other.close()
                for number in (alive, ended, wake):
                    os.close(number)
                _become(**request, streams=streams)
            for stream in streams:
                os.close(stream)
            running[pid] = channel
            channel.sendall(pid.to_bytes(4, "little", signed=True))


def _put_in_place() -> None:
    """Let Transom's own processes be forked."""
    from transom import plugin_trials
    from transom.preparation import child

    here = sys.modules[__name__]
    child.subprocess = plugin_trials.subprocess = here  # type: ignore[attr-defined]


def _reap(running: dict[int, socket.socket]) -> None:
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        with running.pop(pid) as channel, contextlib.suppress(OSError):  # nobody may wait for it any more
            channel.sendall(os.waitstatus_to_exitcode(status).to_bytes(4, "little", signed=True))


def _become(
    code: str,
    arguments: list[str],
    parent: int,
    environment: dict[str, str],
    folder: str,
    session: bool,
    streams: list[int],
) -> None:
    """Be the process that was asked for. At its end the interpreter is not taken down, which takes half a second after
    so many imports: threads are waited for, exit handlers run, and streams are flushed."""
    if session:
        os.setsid()
    os.getppid = lambda: parent  # type: ignore[assignment]
    for place, stream in enumerate(streams):
        os.dup2(stream, place)
        os.close(stream)
    # The streams of the process that forks know whether theirs can be sought.
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  for the whole process
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    paths = [p for p in environment.get("PYTHONPATH", "").split(os.pathsep) if p]
    here = str(Path(__file__).parent)
    sys.path[:] = ["", *paths, *(p for p in sys.path if p not in (*paths, "", here))]
    sys.argv[:] = ["-c", *arguments]
    sys.dont_write_bytecode = bool(environment.get("PYTHONDONTWRITEBYTECODE"))
    tempfile.tempdir = None
    importlib.invalidate_caches()
    scope: dict[str, Any] = {"__name__": "__main__", "__builtins__": __builtins__}
    status: object = 0
    try:
        exec(compile(code, "<string>", "exec"), scope)
    except SystemExit as end:
        status = end.code
    except BaseException:  # noqa: BLE001  as Python reports what nobody caught
        traceback.print_exc()
        status = 1
    if isinstance(status, str):
        print(status, file=sys.stderr)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))
