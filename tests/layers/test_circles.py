"""No file imports itself by way of others: not in the core, in no backend, not in the benchmarks, not in the tools."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]
PLACES = ("core", *(f"backends/{p.name}" for p in sorted((ROOT / "backends").iterdir())), "benchmarks", "tools")
"""Folders that Python's path holds when their files run."""


def modules_of(roots: list[Path]) -> dict[str, Path]:
    """Files by the name that they are imported by."""
    found = {}
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(name: str, path: Path, known: Mapping[str, Path]) -> Iterator[str]:
    """Modules that a file imports when it is imported or when it runs; not those under `if TYPE_CHECKING:`."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            inner = (f"{base}.{alias.name}" for alias in node.names)
            yield from (module if module in known else base for module in inner)
        else:
            waiting += ast.iter_child_nodes(node)


def circle_of(roots: list[Path]) -> str:
    """The files of a circle, each of which imports the one after it; empty where there is none."""
    known = modules_of(roots)
    graph = {
        name: {i for i in imports_of(name, path, known) if i in known and i != name} for name, path in known.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return " <- ".join(error.args[1])
    return ""


def test_no_file_imports_itself_by_way_of_others() -> None:
    circle = circle_of([ROOT / place for place in PLACES if (ROOT / place).is_dir()])
    assert not circle, circle


def test_circles_are_found_in_functions_and_not_among_types(tmp_path: Path) -> None:
    package = tmp_path / "p"
    package.mkdir()
    (package / "__init__.py").write_text("from p.a import x\n")
    (package / "a.py").write_text("def f():\n    from p import b\n")
    (package / "b.py").write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .a import x\n")
    assert not circle_of([tmp_path])
    (package / "b.py").write_text("def f():\n    if True:\n        from .a import x\n")
    assert set(circle_of([tmp_path]).split(" <- ")) == {"p.a", "p.b"}
