"""What the tests of the artifact cache share: a cache in a temporary folder, and artifacts with random content."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from transom.artifacts import Cache, Origin, StoredArtifact
from transom.contract import Artifact

Build = Callable[..., StoredArtifact]


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


@pytest.fixture
def origin() -> Origin:
    return Origin(
        source="SmolLM2",
        backend="openvino_cpu",
        backend_version="0.1.0",
        device={"kind": "cpu", "id": "cpu", "arch": "x86_64", "identity": "Xeon", "name": "Xeon"},
        drivers={"openvino": "2026.2"},
        options={"precision": "bf16", "threads": 4},
        ingredients={"exact": True},
    )


@pytest.fixture
def build(origin: Origin, dice: random.Random) -> Build:
    """Store an artifact with two random files under a key."""

    def build(cache: Cache, key: str, size: int = 1000) -> StoredArtifact:
        files: dict[str, bytes | Path] = {
            "model.xml": dice.randbytes(size),
            "weights/0.bin": dice.randbytes(size),
        }
        with cache.building(key) as slot:
            assert slot.found is None
            return slot.store(Artifact(files, {"openvino": "2026.2", "arch": "x86_64"}, ("bf16",)), origin)

    return build


@pytest.fixture
def python() -> Callable[..., subprocess.Popen[str]]:
    """Start a script in another process; its output is text on a pipe."""

    def start(script: str, *arguments: str | Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", script, *map(str, arguments)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return start
