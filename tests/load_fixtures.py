"""Fixtures of the tests that load models: a tiny model, made-up machines and backends, and two ways to load with them.

`here` loads in the test's own process, the jobs of the child process included: quick, for everything that stays alive.
`export` makes a bundle there, and `elsewhere` is another machine to load it on.
`packages` installs the made-up backends as a distribution, for tests in which a process dies or a fresh one is needed.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import byte_llama
import forked
from made_up import CPU

import transom
from transom import hardware
from transom.artifacts import Cache, entries, files
from transom.bundles import exported
from transom.contract import Cancelled, Device
from transom.graph import Graph
from transom.loading import child_jobs, machine
from transom.plugins import LoadedBackend, Plugins
from transom.preparation import child, memory, stages
from transom.preparation.entry import run as run_job
from transom.reference import ReferenceBackend
from transom.sources import Source, SourceModel
from transom.text import GenerationDefaults


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, shared_rng: Any) -> Path:
    """The GGUF file. Its time is in the past, so that its hash may be remembered."""
    path = byte_llama.write_gguf(
        tmp_path_factory.mktemp("model") / "tiny.gguf", shared_rng("the tiny model of the loading tests")
    )
    past = time.time() - 100
    os.utime(path, (past, past))
    return path


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable of the person who runs the tests decides, and nothing goes to that person's cache."""
    for name in [n for n in os.environ if n.startswith("TRANSOM_") and n != "TRANSOM_TEST_SEED"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TRANSOM_CACHE", str(tmp_path / "cache"))


@dataclass
class Here:
    """Loads in this process. `jobs` records which jobs a child process would have been started for."""

    model: Path
    cache: Cache
    monkeypatch: pytest.MonkeyPatch
    devices: list[Device] = field(default_factory=lambda: [CPU])
    backends: list[Any] = field(default_factory=list)
    jobs: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    def use(self, *backends: Any, devices: Sequence[Device] = (CPU,)) -> None:
        """What is installed and what the probe finds; with the reference, which is always there."""
        self.backends = list(backends)
        self.devices = list(devices)

    @property
    def plugins(self) -> Plugins:
        everything = [*self.backends, ReferenceBackend()]
        loaded = [LoadedBackend(b, b.name, "made-up", self.versions.get(b.name, "1.0"), b.name) for b in everything]
        return Plugins([], loaded, [])

    def load(self, model: Any = None, **options: Any) -> Any:
        return transom.load(self.model if model is None else model, cache=self.cache, **options)

    def needed(self, context: int) -> int:
        """Bytes of memory that the model takes in float32 with this context."""
        with self.load(backend="reference", verify="off") as model:
            return memory.plan(model.decoder, CPU, context=context, exact_float32=True).total

    def child(self, entry: str, payload: Mapping[str, Any], *, progress: Any = None) -> child.ChildResult:
        """What `run_in_child` does, without a process: JSON there and back, errors as they cross it."""
        self.jobs.append(payload["work"].rpartition(":")[2])
        assert entry == "transom.preparation.entry:run"
        try:
            value = run_job(json.loads(json.dumps(payload)), progress)
        except Cancelled:
            raise
        except Exception as error:  # noqa: BLE001  as the child does it
            return child.ChildResult(None, child.ChildFailure(**child._describe(error)), 0.0)
        return child.ChildResult(json.loads(json.dumps(value)), None, 0.0)


@pytest.fixture
def here(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Here:
    here = Here(tiny_model, Cache(tmp_path / "cache"), monkeypatch)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", os.environ.get("OPENBLAS_NUM_THREADS", "2"))  # `entry.run` sets it
    monkeypatch.setattr(child_jobs, "run_in_child", here.child)
    monkeypatch.setattr(machine, "load_plugins", lambda: here.plugins)
    monkeypatch.setattr(stages, "load_plugins", lambda: here.plugins)
    monkeypatch.setattr(hardware, "probe", lambda probe_file=None: hardware.ProbeResult(tuple(here.devices)))
    return here


@pytest.fixture
def export(here: Any, tmp_path: Path) -> Callable[..., exported.Exported]:
    def run(model: Any = None, **options: Any) -> exported.Exported:
        where = {"target": "cpu", "out": tmp_path / "bundle", "cache": here.cache}
        return transom.export(here.model if model is None else model, **{**where, **options})

    return run


@pytest.fixture
def elsewhere(here: Any, tmp_path: Path) -> Any:
    """Forgets the cache in which the bundle was made, as another machine would."""

    def move() -> None:
        shutil.rmtree(here.cache.root)
        here.cache = Cache(tmp_path / "elsewhere")
        here.jobs.clear()

    return move


@dataclass
class Thing:
    """What a user would pass: no path, and nothing that a child process could open."""

    graph: Graph


class MemorySource(Source):
    """Builds graphs without a file."""

    kind = "memory"

    def matches(self, spec: Any) -> bool:
        return isinstance(spec, Thing)

    def fingerprint(self, spec: Any) -> str:
        raise AssertionError("a model in memory is named by its graph")

    def open(self, spec: Any, *, context: Any = None, progress: Any = None) -> SourceModel:
        return SourceModel(spec.graph, None, None, GenerationDefaults(), "thing", "memory", ["a note of the source"])


@dataclass
class Packages:
    """Made-up distributions, and fresh processes in which they are installed."""

    folder: Path
    environment: dict[str, str]
    model: Path

    @property
    def cache(self) -> Path:
        return Path(self.environment["TRANSOM_CACHE"])

    @property
    def log(self) -> list[str]:
        """One line for each compile."""
        path = Path(self.environment["MADE_UP_LOG"])
        return path.read_text().splitlines() if path.exists() else []

    def use(self, *backends: Mapping[str, Any], devices: Sequence[Device] = (CPU,)) -> None:
        self.environment["MADE_UP"] = json.dumps(backends)
        hardware.write_probe_file(self.folder / "probe.json", devices)

    def start(self, code: str, *arguments: str | Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", PREAMBLE + textwrap.dedent(code), self.model, *map(str, arguments)],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, code: str, *arguments: str | Path, fresh: bool = False) -> Any:
        """The JSON that the code prints last. What a test says of imports needs a `fresh` interpreter."""
        if fresh:
            return self.finish(self.start(code, *arguments))
        status, out, err = self.fork(code, *arguments)
        assert status == 0, err
        return json.loads(out.strip().splitlines()[-1])

    def fork(self, code: str, *arguments: str | Path) -> tuple[int, str, str]:
        """The status and what was printed; the negative number of the signal that ended it."""
        command = [sys.executable, "-c", PREAMBLE + textwrap.dedent(code), str(self.model), *map(str, arguments)]
        done = forked.run(
            command, env=self.environment, stdin=forked.DEVNULL, capture_output=True, text=True, timeout=120
        )
        return done.returncode, done.stdout, done.stderr

    def finish(self, process: subprocess.Popen[str]) -> Any:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        return json.loads(out.strip().splitlines()[-1])


PREAMBLE = """
import json, sys, time
import transom
from transom.errors import TransomError
model = sys.argv[1]

def show(**facts):
    print(json.dumps(facts))

def outcome(**options):
    try:
        with transom.load(model, **options) as loaded:
            text = loaded.generate("Hello", max_new_tokens=4, temperature=0).text
            return {"text": text, "report": loaded.report.to_dict()}
    except TransomError as error:
        return {"error": type(error).__name__, "cause": error.cause, "fix": error.fix, "details": error.details}
"""


@pytest.fixture
def packages(tiny_model: Path, tmp_path: Path) -> Packages:
    folder = tmp_path / "packages"
    info = folder / "made_up-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "made_up.py").write_text((Path(__file__).parent / "made_up.py").read_text())
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: made-up\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[transom.backends]\nmade_up = made_up\n")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), *(p for p in sys.path if p)]),
        "TRANSOM_CACHE": str(tmp_path / "cache"),
        "TRANSOM_PROBE_FILE": str(folder / "probe.json"),
        "MADE_UP_LOG": str(tmp_path / "compiles.log"),
        "OPENBLAS_NUM_THREADS": "1",
    }
    made = Packages(folder, environment, tiny_model)
    made.use()
    return made


def fill_disk(monkeypatch: pytest.MonkeyPatch, root: Path, room: int) -> None:
    """Let writes below the folder fail as on a full disk, once `room` bytes have been written."""
    left = [room]
    write = files.write_durably

    def limited(path: Path, data: bytes) -> None:
        if path.is_relative_to(root):
            left[0] -= len(data)
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, data)

    monkeypatch.setattr(entries, "write_durably", limited)
    monkeypatch.setattr(files, "write_durably", limited)
