"""Made-up distributions, installed as pip would leave them, and a fresh process that loads them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

SOUND = """
from transom.contract import Offer, Refusal, hookimpl

class {cls}:
    name = "{name}"
    api = (1, 0)
    def probe(self, devices):
        return [Offer(d.id, "native", "made up") for d in devices]
    def claim(self, graph, device, options):
        return []
    def compile(self, part, device, options, progress):
        raise RuntimeError("made up to be listed, not to run")
    def check(self, artifact, device):
        raise RuntimeError("made up to be listed, not to run")
    def load(self, artifact, device, options, scratch):
        raise RuntimeError("made up to be listed, not to run")
"""

HOOK = """
@hookimpl
def transom_backends():
    return [{cls}()]
"""


class Environment:
    """A directory on `sys.path` that stands for `site-packages`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def install(
        self, distribution: str, source: str, *, entry_point: str | None = None, version: str = "1.0", value: str = ""
    ) -> None:
        """One module and its metadata."""
        module = distribution.replace("-", "_").lower()
        (self.directory / f"{module}.py").write_text(textwrap.dedent(source), encoding="utf-8")
        info = self.directory / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        point = f"{entry_point or module} = {value or module}"
        (info / "entry_points.txt").write_text(f"[console_scripts]\nx = y:z\n\n[transom.backends]\n{point}\n")

    def install_sound(self, distribution: str, name: str, extra: str = "", **options: str) -> None:
        source = SOUND.format(cls="Sound", name=name) + textwrap.dedent(extra) + HOOK.format(cls="Sound")
        self.install(distribution, source, **options)

    def run(self, code: str, environment: Mapping[str, str] | None = None) -> Any:
        """Run code in a fresh process and return the JSON it prints last."""
        path = os.pathsep.join([str(self.directory), *(p for p in sys.path if p)])
        child = subprocess.run(
            [sys.executable, "-c", PREAMBLE + textwrap.dedent(code)],
            env={
                **os.environ,
                "PYTHONPATH": path,
                "TRANSOM_CACHE": str(self.directory / "cache"),
                **(environment or {}),
            },
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert child.returncode == 0, child.stderr
        return json.loads(child.stdout.strip().splitlines()[-1])

    def load(self) -> tuple[dict[str, str], list[dict[str, str]]]:
        """(backend to distribution, failures), without what is installed besides the made-up distributions."""
        backends, failures = self.run("show(load_plugins())")
        return backends, failures


PREAMBLE = """
import json, dataclasses
from transom.contract import Device, Offer, Refusal
from transom.plugins import load_plugins

CPU = Device("cpu", "cpu", "x86_64", 1 << 34)
GPU = Device("cuda", "cuda:0", "sm_89", 1 << 34)

def foreign(failures):
    return [dataclasses.asdict(f) for f in failures if f.distribution != "transom"]

def show(plugins):
    backends = {n: b.distribution for n, b in plugins.backends.items() if not b.core}
    print(json.dumps([backends, foreign(plugins.failures)]))

def asked(devices=(CPU, GPU)):
    plugins = load_plugins()
    mine = {n for n, b in plugins.backends.items() if not b.core}
    probed = plugins.probe(devices)
    answers = [[n, a.device_id, type(a).__name__, a.why if isinstance(a, Offer) else a.reason]
               for n, a in probed.answers if n in mine]
    print(json.dumps([answers, foreign(plugins.failures), foreign(probed.failures)]))
"""


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path)


Change = Callable[[str, str], str]


@pytest.fixture
def sound_source() -> str:
    """A module with a sound backend `Sound` of name `sound`, to break in one place."""
    return SOUND.format(cls="Sound", name="sound") + HOOK.format(cls="Sound")
