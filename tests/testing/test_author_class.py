"""`BackendConformance` as an author meets it: one screen of test file, run by pytest in a process of its own.

Draws: the numbers are only carried along; what is checked does not depend on them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
FILE = """
from transom.contract import Device
from transom.testing import BackendConformance
from {module} import {name}

class TestMine(BackendConformance):
    backend = {name}()
    device = Device("cpu", "cpu", "x86_64", 8 << 30)
    may_refuse = {may_refuse}
    seed = {seed}
"""


def pytest_on(
    tmp_path: Path, name: str, select: str, module: str = "test_kit", may_refuse: str = "[]", seed: str = "7"
) -> tuple[int, str]:
    file = tmp_path / "test_mine.py"
    file.write_text(FILE.format(module=module, name=name, may_refuse=may_refuse, seed=seed))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *(p for p in sys.path if p)])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", select, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
    return done.returncode, done.stdout


def test_failure_tells_the_fault_the_demand_and_the_seed(tmp_path: Path) -> None:
    status, out = pytest_on(tmp_path, "GarbageLogits", "logits.gqa", module="broken_numbers", seed="4711")
    assert status == 1
    assert "normalized error" in out
    assert "The contract: A decoder with gqa: prefill, chunks and decoding" in out
    assert "seed = 4711" in out


def test_refusal_fails_until_it_is_listed(tmp_path: Path) -> None:
    status, out = pytest_on(tmp_path, "NoMatMul", "operator.MatMul")
    assert status == 1
    assert "no kernel for MatMul" in out
    assert "add 'operator.MatMul' to may_refuse" in out
    status, out = pytest_on(tmp_path, "NoMatMul", "operator.MatMul or refusals", may_refuse="['operator.MatMul']")
    assert status == 0, out


def test_list_of_refusals_may_not_hold_what_works_or_does_not_exist(tmp_path: Path) -> None:
    status, out = pytest_on(tmp_path, "NoMatMul", "operator.Neg or refusals", may_refuse="['operator.Neg']")
    assert status == 1
    assert "no longer refused: remove it" in out
    status, out = pytest_on(tmp_path, "NoMatMul", "refusals", may_refuse="['operator.Nay']")
    assert status == 1
    assert "there is no such check" in out
