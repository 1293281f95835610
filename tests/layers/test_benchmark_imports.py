"""Benchmarks run rarely and mostly by hand: whatever they import from the project is there, and each one starts."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
ROOTS = (BENCHMARKS, ROOT / "core", ROOT / "tests", *sorted((ROOT / "backends").iterdir()))
SCRIPTS = sorted(p for p in BENCHMARKS.glob("*.py") if 'if __name__ == "__main__":' in p.read_text(encoding="utf-8"))
PEERS = (
    "openvino_genai", "llama_cpp", "torch", "triton", "flashinfer", "tensorrt_rtx", "cuda", "onnxruntime",
    "onnxruntime_qnn", "openvino",
)  # fmt: skip
"""What a script may miss until it measures."""


def file_of(module: str) -> Path | None:
    """The file of a module of the project; None for others."""
    for root in ROOTS:
        base = root.joinpath(*module.split("."))
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                return path
    return None


def names_of(path: Path) -> set[str]:
    """Names that a module defines at its top level, those of its `__all__`, and its submodules."""
    found = {p.stem for p in path.parent.iterdir()} if path.name == "__init__.py" else set()
    waiting: list[ast.AST] = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
            if any(isinstance(t, ast.Name) and t.id == "__all__" for t in targets) and node.value is not None:
                found |= {n.value for n in ast.walk(node.value) if isinstance(n, ast.Constant)}
        elif isinstance(node, ast.If | ast.Try | ast.With):
            waiting += ast.iter_child_nodes(node)
    return found


def missing(path: Path) -> Iterator[str]:
    """Names of the project that a file imports, in functions too, and that are not there."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            source = file_of(node.module)
            if source is not None:
                known = names_of(source)
                yield from (f"{node.module}.{alias.name}" for alias in node.names if alias.name not in known)
            elif node.module.split(".")[0].startswith("transom") or file_of(node.module.split(".")[0]):
                yield node.module


def test_what_benchmarks_import_from_the_project_is_there() -> None:
    found = {p.relative_to(ROOT).as_posix(): list(missing(p)) for p in sorted(BENCHMARKS.rglob("*.py"))}
    assert {path: names for path, names in found.items() if names} == {}


def test_a_removed_name_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text(
        "import json\nfrom transom.contract import Device, Gone\n"
        "def f():\n    from parts.nothing import x\n    from transom import load\n"
    )
    assert list(missing(path)) == ["transom.contract.Gone", "parts.nothing"]


STARTING = """
import runpy, sys
from importlib.abc import MetaPathFinder

class Without(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in PEERS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

PEERS, scripts = sys.argv[1].split(","), sys.argv[2:]
sys.meta_path.insert(0, Without())
for script in scripts:
    sys.path[0], sys.argv = script.rpartition("/")[0], [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        assert not end.code, script
    else:
        raise AssertionError(f"{script} did not end after --help")
"""


def test_every_script_starts_without_its_peers() -> None:
    """One process for all, because most of a start is what they have in common."""
    command = [sys.executable, "-c", STARTING, ",".join(PEERS), *map(str, SCRIPTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("usage: ") == len(SCRIPTS)
