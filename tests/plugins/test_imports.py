"""Loading plugins is cheap: it imports no engine, no torch and no ONNX."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import transom

HEAVY = [
    "torch",
    "triton",
    "tensorrt",
    "tensorrt_rtx",
    "openvino",
    "onnxruntime",
    "onnx",
    "onnx_ir",
    "transformers",
    "gguf",
]

CODE = """
import json, sys
{statements}
print(json.dumps(sorted(name for name in {heavy!r} if name in sys.modules)))
"""


def imported_by(statements: str) -> list[str]:
    code = CODE.format(statements=statements, heavy=HEAVY)
    path = [p for p in sys.path if p]
    child = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{code}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert child.returncode == 0, child.stderr
    return list(json.loads(child.stdout.strip().splitlines()[-1]))


def test_importing_the_loader_imports_nothing_heavy() -> None:
    assert imported_by("import transom, transom.plugins, transom.hardware, transom.selection") == []


def test_no_module_hides_a_name_of_the_package() -> None:
    """Importing `transom.x` sets the attribute `x`, so a public name must not be a module's too."""
    hidden = [name for name in transom.__all__ if importlib.util.find_spec(f"transom.{name}") is not None]
    assert hidden == []


def test_loading_every_installed_plugin_imports_nothing_heavy() -> None:
    assert imported_by("import transom.plugins; transom.plugins.load_plugins()") == []


def test_every_plugin_of_this_distribution_loads() -> None:
    """Otherwise the tests beside this one would prove nothing."""
    from transom.plugins import load_plugins

    assert [str(failure) for failure in load_plugins().failures if failure.distribution == "transom"] == []
    assert any(backend.core for backend in load_plugins().backends.values())


def test_probing_this_machine_and_asking_every_backend_imports_nothing_heavy() -> None:
    statements = """
from transom.plugins import load_plugins
from transom.hardware import probe_devices
load_plugins().probe(probe_devices())
"""
    assert imported_by(statements) == []
