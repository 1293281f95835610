"""What a load imports into the process that asked for it: nothing that builds graphs, not even the first time.

Draws: the numbers are only carried along; what is checked does not depend on them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import add_tokenizer, tiny, write_gguf

LOAD = """
import json, sys, transom
with transom.load(sys.argv[1], device="cpu", backend="openvino_cpu") as model:
    model.generate([1, 2, 3], max_new_tokens=2, ignore_eos=True)
    print(json.dumps({"hit": model.report.cache_hit, "modules": sorted(sys.modules)}))
"""
BUILDERS = {"onnx", "onnx_ir", "sympy", "transom.graph.builder", "transom.reference.executor"}


@pytest.fixture(params=["hf", "gguf"])
def model(request: pytest.FixtureRequest, tmp_path: Path, rng: np.random.Generator) -> Path:
    checkpoint = tiny("llama", tmp_path / "hf", rng)
    add_tokenizer(tmp_path / "hf")
    if request.param == "hf":
        return checkpoint.folder
    write_gguf(checkpoint, tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


@pytest.mark.sweep(but=("gguf",))
def test_neither_the_first_load_nor_a_later_one_imports_what_builds_graphs(model: Path, tmp_path: Path) -> None:
    def load() -> Any:
        environment = {**os.environ, "TRANSOM_CACHE": str(tmp_path / "cache")}
        done = subprocess.run(
            [sys.executable, "-c", LOAD, model], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    past = time.time() - 100  # long enough ago that the content's name may be remembered
    for file in [model, *model.parent.glob("hf/*")]:
        os.utime(file, (past, past))
    first, later = load(), load()
    (tmp_path / "cache" / "remembered" / "fingerprints.json").unlink()
    named_again = load()
    assert [run["hit"] for run in (first, later, named_again)] == [False, True, True]
    for run in (first, later, named_again):
        assert not BUILDERS & set(run["modules"])
