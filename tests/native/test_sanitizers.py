"""The native library under the sanitizers for addresses and for undefined behavior.

The tests of this folder run at random in a process of their own, over a library that is built for it. Of the
instruction sets there are at most two each time: plain C++, whose every shift and sum is checked, and one at random.

Draws: no program, sound or damaged, may make the sanitizers report anything.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from levels import LEVELS, ROOT, hatch_build, pytestmark  # noqa: F401  pytest reads the mark from here

SANITIZERS = "address,undefined,float-cast-overflow"
SECONDS = 12
"""Of running, after some 20 seconds of compiling on two cores."""
OPTIONS = {
    # Python's own memory is left over at the end; compilers misalign AVX-512's variables in a stack that is not real.
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    "PYTHONMALLOC": "malloc",
}


def _runtimes(compiler: Any) -> list[str]:
    """The libraries that must be in the process before anything else is."""
    found = []
    for name in ("libasan.so", "libclang_rt.asan-x86_64.so", "libstdc++.so.6"):
        command = (*compiler.command, f"-print-file-name={name}")
        path = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
        if path.is_absolute() and path.exists():
            found.append(str(path.resolve()))
    return found


def _compiler(build: ModuleType, folder: Path) -> Any:
    """The compiler of this system; skips the test where it cannot sanitize."""
    compiler = build.first_fit(build.candidates())
    if compiler.zig:
        pytest.skip("there is no g++ or clang++ here, and zig has no runtimes for sanitizers")
    source = folder / "probe.cpp"
    source.write_text("int main() { return 0; }\n")
    command = (*compiler.command, f"-fsanitize={SANITIZERS}", str(source), "-o", str(folder / "probe"))
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{compiler.command[0]} has no sanitizers here: {done.stderr.strip().splitlines()[-1]}")
    return compiler


@pytest.mark.timeout(900)
@pytest.mark.sweep  # fuzzing under sanitizers
def test_no_test_and_no_damaged_program_makes_the_sanitizers_report(
    seed: int, rng: np.random.Generator, tmp_path: Path
) -> None:
    build = hatch_build()
    compiler = _compiler(build, tmp_path)
    levels = sorted({"scalar", str(rng.choice(LEVELS))})
    sources = ROOT / build.PACKAGE / build.NATIVE / "src"
    left_out = [f"{unit}.cpp" for unit in build.LEVELS if unit.removeprefix("level_") not in levels]
    shutil.copytree(sources, tmp_path / "native" / "src", ignore=shutil.ignore_patterns(*left_out))
    build.compile_library(tmp_path / "native", compiler, tmp_path, SANITIZERS)
    command = (Path(__file__).with_name("fuzz.py"), tmp_path / build.LIBRARY, seed, SECONDS, *levels)
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env={**os.environ, **OPTIONS, "LD_PRELOAD": " ".join(_runtimes(compiler))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    said = done.stdout
    assert done.returncode == 0, said[-6000:]
    assert "runtime error" not in said, said[-6000:]
    assert "AddressSanitizer" not in said, said[-6000:]
    assert said.splitlines()[-1].endswith(" damaged programs")
