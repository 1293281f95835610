"""A command line of its own for each test: a cache, a state folder, and the made-up backend, in child processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

import byte_llama
import forked
import toy

START = "import sys; sys.argv[0] = 'transom'; from transom.cli import main, output; output.LONG = 1e9; main()"
"""A busy machine takes longer than LONG for this and that, and each time stderr would have a line more."""
CORE = str(Path(__file__).parents[2] / "core")


@dataclass
class CommandLine:
    """Runs `transom …` in a child process with an environment of its own."""

    folder: Path
    environment: dict[str, str]
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def cache(self) -> Path:
        return Path(self.environment["TRANSOM_CACHE"])

    def __call__(
        self,
        *arguments: str | Path,
        input: str | bytes | None = b"",
        env: Mapping[str, str] | None = None,
        start: str = START,
        timeout: float = 120,
    ) -> Done:
        """Run it to its end: forked, or in a fresh interpreter if `start` or Python's own variables are given."""
        data = input.encode() if isinstance(input, str) else input
        forks = start == START and not any(name.startswith("PYTHON") and name != "PYTHONPATH" for name in env or ())
        done = (forked if forks else subprocess).run(
            [sys.executable, "-c", start, *map(str, arguments)],
            input=data,
            capture_output=True,
            env={**self.environment, **(env or {})},
            cwd=self.folder,
            timeout=timeout,
        )
        return Done(done.returncode, done.stdout.decode(), done.stderr.decode())

    def begin(
        self, *arguments: str | Path, env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[bytes]:
        """Start and leave it running; it is killed at the end of the test."""
        options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        child = subprocess.Popen(
            [sys.executable, "-c", START, *map(str, arguments)],
            env={**self.environment, **(env or {})},
            cwd=self.folder,
            **options,
        )
        self.started.append(child)
        return child


@dataclass(frozen=True)
class Done:
    status: int
    out: str
    err: str

    def __iter__(self) -> Any:
        return iter((self.status, self.out, self.err))


def environment(cache: Path, state: Path, packages: Path | None) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TRANSOM_", "TOY_", "XDG_", "_TRANSOM"))}
    paths = [str(packages)] if packages else []
    return kept | {
        "TRANSOM_CACHE": str(cache),
        "XDG_STATE_HOME": str(state),
        "PYTHONPATH": os.pathsep.join([*paths, CORE, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONIOENCODING": "utf-8",
        "COLUMNS": "160",
    }


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory, shared_rng: Any) -> Path:
    """A tiny model file."""
    path = tmp_path_factory.mktemp("model") / "toy.gguf"
    return byte_llama.write_gguf(path, shared_rng("the model of the command line"), context=4096, quantization="Q8_0")


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the backend `toy`."""
    folder = tmp_path_factory.mktemp("packages") / "site"
    toy.install_backend(folder)
    return folder


@pytest.fixture(scope="session")
def warm_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache that all tests share which do not look at it: the model is compiled once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def transom(tmp_path: Path, warm_cache: Path, packages: Path) -> Any:
    """The command line with the backend `toy` installed."""
    line = CommandLine(tmp_path, environment(warm_cache, tmp_path / "state", packages))
    yield line
    _end(line)


@pytest.fixture
def fresh(tmp_path: Path, packages: Path) -> Any:
    """The same with an empty cache."""
    line = CommandLine(tmp_path, environment(tmp_path / "cache", tmp_path / "state", packages))
    yield line
    _end(line)


@pytest.fixture
def bare(tmp_path: Path, warm_cache: Path) -> Any:
    """The command line as Transom comes, without the backend `toy`."""
    line = CommandLine(tmp_path, environment(warm_cache, tmp_path / "state", None))
    yield line
    _end(line)


@pytest.fixture
def say(transom: CommandLine, model: Path) -> Callable[..., Done]:
    """`transom run` of the tiny model on the backend `toy`, without the self-check that it could not pass."""

    def run(*arguments: str | Path, **options: Any) -> Done:
        return transom("run", model, *arguments, "--backend", "toy", "--verify", "off", **options)

    return run


def _end(line: CommandLine) -> None:
    for child in line.started:
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
        child.wait()
        for pipe in (child.stdin, child.stdout, child.stderr):
            if pipe is not None:
                pipe.close()
