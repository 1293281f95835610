"""Each instruction set's functions of sixteen lanes do what plain formulas do, bit for bit where they can.

Draws: what is compared must be equal, whatever the numbers are.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from levels import EVERY, ROOT, TRAPS, hatch_build, pytestmark  # noqa: F401  pytest reads the mark from here

BUILD = hatch_build()
SOURCES = ROOT / BUILD.PACKAGE / BUILD.NATIVE / "src"


@pytest.mark.parametrize("level", EVERY)
@pytest.mark.sweep(only=[n for n in EVERY if n in ("avx_vnni", "avx512_bf16")])  # the lanes of avx2 and of avx512
def test_the_lanes_do_what_plain_formulas_do(level: str, seed: int, tmp_path: Path) -> None:
    unit = (SOURCES / f"level_{level}.cpp").read_text(encoding="utf-8")
    defines = [f"-D{line.split()[1]}" for line in unit.splitlines() if line.startswith("#define TRANSOM_")]
    (header,) = (line.split()[1] for line in unit.splitlines() if line.startswith("#include") and "simd_" in line)
    flags = BUILD.LEVELS[f"level_{level}"]
    program = tmp_path / "lanes"
    compiler = BUILD.first_fit(BUILD.candidates())
    source = Path(__file__).with_name("lanes.cpp")
    # Optimised as the library is, but for multiplications and additions: the formulas have no fused ones.
    command = [
        *compiler.command, *BUILD.COMMON, "-ffp-contract=off", *flags, *defines, f"-DHEADER={header}", f"-I{SOURCES}",
        "-Wno-unused-function", str(source), "-lm", "-o", str(program),
    ]  # fmt: skip
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    preload = {"LD_PRELOAD": str(TRAPS)} if TRAPS else {}
    done = subprocess.run([program, str(seed)], capture_output=True, text=True, env=os.environ | preload)
    assert done.returncode == 0, done.stdout
    assert done.stdout == "all is well\n"
