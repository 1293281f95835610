"""The instruction sets of the native library that this processor has, and whether there is a library here at all."""

from __future__ import annotations

import importlib.util
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
LEVELS = [name for name, needed in library.LEVELS.items() if needed <= DEVICE.features]
