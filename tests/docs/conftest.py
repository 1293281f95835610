"""A folder with a tiny `model.gguf`, and a Python beside it that runs the documentation's examples."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

import byte_llama
from doc_pages import ROOT

Run = Callable[..., str]


@pytest.fixture
def desk(tmp_path: Path, rng: np.random.Generator) -> Path:
    """A folder that holds `model.gguf`."""
    byte_llama.write_gguf(tmp_path / "model.gguf", rng)
    return tmp_path


@pytest.fixture
def run(desk: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run Python in that folder, with a cache of its own; returns what it printed."""
    cache = tmp_path_factory.mktemp("cache")

    def run(*arguments: str | Path, packages: Path | None = None) -> str:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("TRANSOM_", "_TRANSOM"))}
        here = [str(packages)] if packages else []
        paths = [*here, str(ROOT / "core"), str(ROOT / "backends" / "openvino_cpu"), kept.get("PYTHONPATH", "")]
        kept |= {"TRANSOM_CACHE": str(cache), "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
        done = subprocess.run(
            [sys.executable, *map(str, arguments)], cwd=desk, env=kept, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    return run
