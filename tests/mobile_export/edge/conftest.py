"""Puts this folder on the path, and the built runner at hand."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from edge_building import build, build_for_arm64, onnxruntime_library

Said = subprocess.CompletedProcess[str]
Run = Callable[..., Said]


def _runner(command: list[str]) -> Run:
    def run(*words: str | Path) -> Said:
        line = [*command, *map(str, words)]
        return subprocess.run(line, capture_output=True, encoding="utf-8", timeout=120, check=False)

    return run


@pytest.fixture(scope="session")
def built() -> Path:
    return build()


@pytest.fixture(scope="session")
def edge(built: Path) -> Run:
    """Runs transom-edge with the library that the package onnxruntime carries."""
    return _runner([str(built / "transom-edge"), "--onnxruntime", str(onnxruntime_library())])


@pytest.fixture(scope="session")
def edge_arm64() -> Run:
    """The same for arm64, in qemu."""
    return _runner(build_for_arm64())


@pytest.fixture(scope="session")
def call(built: Path) -> Callable[..., Any]:
    """Calls a function of the runner's library, as `driver.cpp` names it."""

    def call(name: str, **request: Any) -> Any:
        text = json.dumps({"call": name, **request})
        done = subprocess.run([built / "edge-driver"], input=text, capture_output=True, encoding="utf-8", check=False)
        if done.returncode:
            raise RuntimeError(done.stderr.strip())
        return json.loads(done.stdout)

    return call
