"""With --json, standard output has the JSON and nothing else, whatever a plugin prints there."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from transom.cli import output
from transom.cli.app import run

NOISE = """
import atexit, ctypes, os, subprocess, sys
libc = ctypes.CDLL(None)
def noise(where):
    print(f"printed {where}")
    libc.printf(f"native {where}\\n".encode())  # stays in the buffer of the C library until the process ends
    os.write(1, f"written {where}\\n".encode())
    subprocess.run([sys.executable, "-c", f"print('child {where}')"])
"""
PLUGIN = (
    NOISE
    + """
noise("at import")
atexit.register(noise, "at exit")
from transom.contract import Refusal, hookimpl
class Loud:
    name, api = "loud", (1, 0)
    def probe(self, devices):
        noise("at probe")
        return [Refusal(d.id, "wrong_device", "made up") for d in devices]
    def claim(self, graph, device, options): ...
    def compile(self, part, device, options, progress): ...
    def check(self, artifact, device): ...
    def load(self, artifact, device, options, scratch): ...
@hookimpl
def transom_backends():
    return [Loud()]
"""
)


@pytest.fixture
def loud(bare: Any, tmp_path: Path) -> Any:
    """The command line with a plugin that prints whenever it is called."""
    packages = tmp_path / "loud"
    info = packages / "loud-1.0.dist-info"
    info.mkdir(parents=True)
    (packages / "loud.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: loud\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[transom.backends]\nloud = loud\n")
    bare.environment["PYTHONPATH"] = os.pathsep.join([str(packages), bare.environment["PYTHONPATH"]])
    return bare


def test_what_a_plugin_prints_goes_to_stderr(loud: Any) -> None:
    done = loud("backends", "--json")
    assert done.status == 0, done.err
    assert "loud" in [backend["name"] for backend in json.loads(done.out)["backends"]]
    for how in ("printed", "native", "written", "child"):
        for where in ("at import", "at probe", "at exit"):
            assert f"{how} {where}" in done.err


def test_an_error_leaves_what_is_printed_on_stderr(loud: Any) -> None:
    done = loud("explain", "no-such-model.gguf", "--json")
    assert done.status == 2
    assert "printed" not in done.out


def test_stdout_is_as_before_after_a_command_in_a_program_that_goes_on(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["devices", "--json"]) == 0
    print("after", flush=True)
    os.write(1, b"native after\n")
    out = capfd.readouterr().out
    value, end = json.JSONDecoder().raw_decode(out)
    assert value["devices"]
    assert out[end:].split("\n") == ["", "after", "native after", ""]


def test_a_stdout_that_is_no_file_gets_the_json_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", seen := io.StringIO())
    monkeypatch.setattr(sys, "stderr", other := io.StringIO())
    output.reserve_stdout()
    print("noise")
    output.print_json({"a": 1})
    output.release_stdout()
    print("after")
    assert seen.getvalue() == '{\n  "a": 1\n}\nafter\n'
    assert other.getvalue() == "noise\n"
