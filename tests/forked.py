"""Processes for tests that are forked from one that has imported what they need, in place of fresh interpreters.

A command takes half a second of processor time, most of which Python spends on imports: with hundreds of commands that
is minutes. `run` starts the code that `python -c` would, with arguments, environment and folder of its own. What a test
says of imports, of closed streams, of signals or of a terminal needs a fresh interpreter: `subprocess` starts those.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

IMPORTED = (
    "numpy", "click", "jinja2", "filelock", "onnx_ir", "gguf", "transom", "transom.api", "transom.cli.app",
    "transom.cli.run", "transom.loading.loader", "transom.generation.model", "transom.sources.gguf",
    "transom.preparation.pipeline",
)  # fmt: skip

_server: tuple[socket.socket, subprocess.Popen[bytes]] | None = None


def run(
    code: str,
    arguments: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: Path,
    input: bytes | None = b"",
    timeout: float = 120,
) -> tuple[int, bytes, bytes]:
    """The exit status, standard output and standard error of `python -c code *arguments`.

    Raises:
        TimeoutExpired: the process took longer than `timeout` seconds; it was killed.
    """
    given = [os.pipe() for _ in range(3)]
    mine, theirs = [given[0][1], given[1][0], given[2][0]], [given[0][0], given[1][1], given[2][1]]
    request = json.dumps([code, list(arguments), dict(env), str(cwd)]).encode()
    channel = _connect()
    socket.send_fds(channel, [len(request).to_bytes(4, "little")], theirs)
    channel.sendall(request)
    for number in theirs:
        os.close(number)
    pid = _number(channel)
    said: dict[int, bytes] = {}
    threads = [threading.Thread(target=_read, args=(mine[place], place, said), daemon=True) for place in (1, 2)]
    threads.append(threading.Thread(target=_write, args=(mine[0], input or b""), daemon=True))
    for thread in threads:
        thread.start()
    channel.settimeout(timeout)
    try:
        status = _number(channel)
    except TimeoutError:
        os.kill(pid, signal.SIGKILL)
        channel.settimeout(None)
        _number(channel)
        raise subprocess.TimeoutExpired(list(arguments), timeout, said.get(1), said.get(2)) from None
    for thread in threads:
        thread.join()
    return status, said[1], said[2]


def _connect() -> socket.socket:
    global _server
    if _server is None:
        ours, theirs = socket.socketpair()
        here = str(Path(__file__).parent)
        code = f"import sys; sys.path.insert(0, {here!r}); import forked; forked.serve({theirs.fileno()})"
        process = subprocess.Popen([sys.executable, "-c", code], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()
        _server = ours, process
        atexit.register(process.wait)
        atexit.register(ours.close)
    return _server[0]


def _read(number: int, place: int, said: dict[int, bytes]) -> None:
    with open(number, "rb") as file:
        said[place] = file.read()


def _write(number: int, data: bytes) -> None:
    with open(number, "wb", buffering=0) as file:
        try:
            file.write(data)
        except BrokenPipeError:
            return  # the process ended before it read all of it, as with a pipe of subprocess.run


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


def serve(number: int) -> None:
    """Fork a process for each request until the channel is closed."""
    import importlib

    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()  # a collection in a forked process would copy every page
    channel = socket.socket(fileno=number)
    while True:
        header, streams, _, _ = socket.recv_fds(channel, 4, 3)
        if not header:
            return
        request = json.loads(_exactly(channel, int.from_bytes(header, "little")))
        pid = os.fork()
        if pid == 0:
            channel.detach()
            os.close(number)
            _become(*request, streams)
        for stream in streams:
            os.close(stream)
        channel.sendall(pid.to_bytes(4, "little", signed=True))
        _, status = os.waitpid(pid, 0)
        channel.sendall(os.waitstatus_to_exitcode(status).to_bytes(4, "little", signed=True))


def _become(code: str, arguments: list[str], environment: dict[str, str], folder: str, streams: list[int]) -> None:
    """Be the process that was asked for. At its end the interpreter is not taken down, which takes half a second after
    so many imports: threads are waited for, exit handlers run, and streams are flushed."""
    import importlib

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
