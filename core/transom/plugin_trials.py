"""Tries what is new of a plugin in a child process first, because native code in it may end the process.

The artifact cache remembers a successful trial by the plugin's files, so that a known plugin costs a look-up and no
process. What the plugin imports may change later, such as an engine that is updated. So a file in the cache stands for
each plugin from its trial until it has answered in this process. Where a process ended before, the file is left, and
the plugin is tried again. Transom's own plugins are not tried. A failed trial is not remembered: the plugin is tried
again at the next start, and works once it has been fixed.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import importlib.util
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import NoReturn

from transom.artifacts import Cache, artifact_key
from transom.artifacts.files import make_private
from transom.contract import Device
from transom.errors import TransomError

SECONDS = 60.0
"""How long a trial may take."""
SOUND = 84
"""Exit status of a child process that has done everything; a plugin that ends the process hardly uses it."""

_STORE = "plugins"
_FOLDER = "running"
_TAIL = 2000

_begun: set[Path] = set()
"""The files of this process."""


class Killed(Exception):
    """A plugin ended its child process. The text says how, the attribute `output` what it wrote before."""

    def __init__(self, how: str, output: str) -> None:
        super().__init__(how)
        self.output = output


def try_first(point: EntryPoint, version: str, devices: Sequence[Device], rehearse: str) -> None:
    """Import a plugin in a child process and have its backends probe these devices, unless that has gone well before.

    An exception of the plugin is no failure here: it is met again, and recorded, in this process. Where no child
    process can be started, nothing is tried.

    Raises:
        Killed: the child process crashed, ended, or did not end in time.
    """
    if not sys.executable or getattr(sys, "frozen", False):
        return
    key = artifact_key(
        {
            "value": point.value,
            "version": version,
            "python": list(sys.version_info[:3]),
            "files": [list(state) for state in _files(point.module)],
            "devices": [[d.id, d.identity, sorted(map(str, d.drivers.items()))] for d in devices],
        }
    )
    cache = _cache()
    mark = None if cache is None else cache.root / _FOLDER / f"plugin-{key}"
    if cache is not None and mark is not None and not _begin(mark) and cache.recall(_STORE, key, bool):
        return
    try:
        _try(point, devices, rehearse)
    except Killed:
        if mark is not None:
            _begun.discard(mark)  # it stays, so that the next start tries again
        raise
    except OSError:  # no process can be started
        return
    if cache is not None:
        cache.remember(_STORE, key, True)


def _try(point: EntryPoint, devices: Sequence[Device], rehearse: str) -> None:
    """The child process. Raises Killed, or OSError where it cannot be started."""
    path = [entry for entry in sys.path if isinstance(entry, str)]
    start = f"import sys; sys.path[:] = {path!r}; from transom.plugin_trials import main; main()"
    request = pickle.dumps((rehearse, point.name, point.value, tuple(devices)))
    try:
        done = subprocess.run(
            [sys.executable, "-c", start],
            input=request,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise Killed(f"did not end within {SECONDS:g} s", _text(error.stderr)) from None
    if done.returncode != SOUND:
        raise Killed(f"ended the process with {_how(done.returncode)}", _text(done.stderr))


def went_well() -> None:
    """The plugins that were tried have been imported, and have answered, in this process."""
    while _begun:
        with contextlib.suppress(OSError):  # the plugin is tried once more
            _begun.pop().unlink()


def _begin(mark: Path) -> bool:
    """Leave a file until `went_well`. Returns whether one was there, which another process may have left just now."""
    if mark in _begun:
        return False
    try:
        make_private(mark.parent)
        was_there = mark.exists()
        mark.touch(mode=0o600)
    except OSError:
        return False
    _begun.add(mark)
    return was_there


def main() -> NoReturn:
    """The child process: do once what the parent is about to do, and end without the shutdown code of engines."""
    import faulthandler

    faulthandler.enable()
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    function, *arguments = pickle.loads(sys.stdin.buffer.read())
    module, _, name = function.partition(":")
    getattr(importlib.import_module(module), name)(*arguments)
    os._exit(SOUND)


def _cache() -> Cache | None:
    try:
        return Cache.default()
    except TransomError:  # a variable that is wrong; what needs the cache says so
        return None


def _files(module: str) -> list[tuple[str, int, int]]:
    """Path, size and time of the top-level package and of the module, without importing anything."""
    top, _, rest = module.partition(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError, AttributeError):
        return []
    if spec is None:
        return []
    paths = [Path(spec.origin)] if spec.has_location and spec.origin else []
    for folder in spec.submodule_search_locations or ():
        stem = Path(folder, *rest.split("."))
        suffixes = importlib.machinery.all_suffixes()
        paths += [stem / "__init__.py", *(stem.with_name(stem.name + suffix) for suffix in suffixes)]
    states = []
    for path in paths:
        try:
            stat = path.stat()
        except OSError:
            continue
        states.append((str(path), stat.st_size, stat.st_mtime_ns))
    return states


def _how(status: int) -> str:
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"status {status if abs(status) < 256 else hex(status & 0xFFFFFFFF)}"


def _text(output: bytes | str | None) -> str:
    text = output.decode(errors="replace") if isinstance(output, bytes) else output or ""
    return text[-_TAIL:]
