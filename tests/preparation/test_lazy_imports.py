"""Modules whose import is deferred until an attribute is used."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from transom.preparation.lazy_imports import import_later


@pytest.fixture
def slow_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "seldom.py").write_text("import time\ntime.sleep(0.05)\nVALUE = [1]\nclass Kind: ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "seldom"
    sys.modules.pop("seldom", None)


def test_a_module_is_imported_when_it_is_used_and_once(slow_module: str) -> None:
    import_later(slow_module)
    import seldom  # type: ignore[import-not-found]

    assert "VALUE" not in vars(seldom)
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(seldom.VALUE)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(value is found[0] for value in found)
    assert sys.modules["seldom"].VALUE is found[0]
    assert isinstance(sys.modules["seldom"].Kind(), seldom.Kind)
    with pytest.raises(AttributeError, match="NOTHING"):
        _ = seldom.NOTHING


def test_what_is_imported_already_stays(slow_module: str) -> None:
    import seldom

    import_later(slow_module)
    assert sys.modules["seldom"] is seldom


def test_onnx_ir_works_without_sympy_until_sizes_are_added() -> None:
    program = """
import sys
from transom.preparation.lazy_imports import import_later
import_later("sympy", "onnx_ir._symbolic_shapes")
import onnx_ir as ir
size = ir.SymbolicDim("tokens")
assert "sympy.core" not in sys.modules
print(size + 1)
assert "sympy.core" in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tokens" in done.stdout
