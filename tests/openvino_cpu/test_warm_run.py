"""A `transom run` of a model that the cache has imports exactly the modules of `warm_run_modules.txt`.

A module that is imported but not used costs every start; what comes from other packages may become slow with a new
version of theirs. So the list is exact: transom's modules by name, others by their top-level package, without the
standard library.

Draws: the weights are only carried along; what is checked does not depend on them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import byte_llama
import numpy as np
import pytest

from transom.hardware import cpu
from transom_openvino_cpu.native import choosing

LIST = Path(__file__).with_name("warm_run_modules.txt")
OF_SOME_MACHINES = frozenset({"archspec", "pynvml"})
"""What the probe imports on some machines: for a processor that the system describes badly, and for NVIDIA's driver."""
RUN = """
import sys
before = set(sys.modules)  # what the environment's own .pth files import
import atexit, json
atexit.register(lambda: sys.stderr.write("\\n" + json.dumps(sorted(set(sys.modules) - before))))
from transom.cli import main
main()
"""


def imported(model: Path, cache: Path) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRANSOM_")}
    done = subprocess.run(
        [sys.executable, "-c", RUN, "run", model, "Hello", "--max-tokens", "2", "--device", "cpu"],
        env={**environment, "TRANSOM_CACHE": str(cache)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    modules: list[str] = json.loads(done.stderr.splitlines()[-1])
    return modules


def listed(modules: list[str]) -> set[str]:
    """As in the list: transom's modules, and the top-level packages of others."""
    found = set()
    for module in modules:
        top = module.partition(".")[0]
        ours = top == "transom" or top.startswith("transom_")
        found |= {module} if ours else {top} - sys.stdlib_module_names - OF_SOME_MACHINES
    return found


@pytest.mark.skipif(
    choosing.level_on(cpu.probe_cpu()) is None, reason="without the native library OpenVINO itself is imported"
)
def test_a_warm_run_imports_what_the_list_names_and_nothing_else(tmp_path: Path, rng: np.random.Generator) -> None:
    model = byte_llama.write_gguf(tmp_path / "tiny.gguf", rng)
    past = time.time() - 100  # long enough ago that the content's name may be remembered
    os.utime(model, (past, past))
    imported(model, tmp_path / "cache")
    found = listed(imported(model, tmp_path / "cache"))
    wanted = {line for line in LIST.read_text().splitlines() if line and not line.startswith("#")}
    new, gone = sorted(found - wanted), sorted(wanted - found)
    assert not new, (
        f"A warm run imports more than before: {', '.join(new)}. Import it where it is used, or, if every run needs "
        f"it, add it to {LIST.name} and measure the start with: transom bench MODEL --startup"
    )
    assert not gone, f"A warm run no longer imports {', '.join(gone)}: remove these lines from {LIST.name}"
