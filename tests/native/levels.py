"""The instruction sets of the native library that can be run here, and whether there is a library here at all.

AMX and AVX-VNNI can be, wherever the rest of their level is there: `traps.cpp` does what the processor cannot.
"""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import tempfile
from pathlib import Path
from types import ModuleType

import pytest

from transom.hardware.cpu import probe_cpu
from transom_openvino_cpu.native import library

ROOT = Path(__file__).parents[2]


def hatch_build() -> ModuleType:
    """`hatch_build.py`, which is in no package."""
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


UNSUPPORTED: str = hatch_build().unsupported()
pytestmark = pytest.mark.skipif(bool(UNSUPPORTED), reason=f"no library: {UNSUPPORTED}")

DEVICE = probe_cpu()
NATIVE = [name for name, needed in library.LEVELS.items() if needed <= DEVICE.features]
"""The instruction sets that the processor itself has, best first."""


MORE = frozenset({"avx_vnni", "amx_tile", "amx_int8", "amx_bf16"}) - DEVICE.features
"""What `traps.cpp` does where the processor does not."""


_FOLDER = tempfile.TemporaryDirectory(prefix="transom-traps-")


def _traps() -> Path | None:
    """`traps.cpp`, compiled, where there is something for it to do."""
    if UNSUPPORTED or not MORE:
        return None
    build = hatch_build()
    made, source = Path(_FOLDER.name, "traps.so"), Path(__file__).with_name("traps.cpp")
    compiler = build.first_fit(build.candidates())
    command = [*compiler.command, *build.COMMON, "-shared", str(source), "-o", str(made), *build.LINK]
    subprocess.run(command, check=True)
    return made


TRAPS = _traps()
"""A library that takes these instructions over in every process that opens it, as this one does."""
if TRAPS is not None:
    ctypes.CDLL(str(TRAPS))
    if "amx_tile" in MORE:  # nobody is asked for registers that are not there
        library.permitted = lambda level: True

EVERY = [name for name, needed in library.LEVELS.items() if needed <= DEVICE.features | (MORE if TRAPS else set())]
"""What can be run here: the best first."""
LEVELS = [name for name in EVERY if name != "avx_vnni" or name in NATIVE]
"""What all tests run. A trap takes microseconds, and AVX-VNNI is one instruction in place of many for a tile."""
