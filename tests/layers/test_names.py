"""A public class name means one thing, across the core, the backends, the benchmarks and the tools."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
SEVERAL = {"Choice": 2}
"""Names that the core still has several classes of, and how many: a number may fall, and then the line goes."""


def public_classes(path: Path) -> list[str]:
    """Names of the classes of a module that have no underscore in front."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return [node.name for node in body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]


def test_each_public_class_name_has_one_meaning() -> None:
    found: dict[str, list[str]] = defaultdict(list)
    for place in ("core", "backends", "benchmarks", "tools"):
        for path in sorted((ROOT / place).rglob("*.py")):
            for name in public_classes(path):
                found[name].append(path.relative_to(ROOT).as_posix())
    wrong = {name: paths for name, paths in found.items() if len(paths) > 1}
    assert not wrong, "\n".join(f"{name}: {', '.join(paths)}" for name, paths in sorted(wrong.items()))


def test_public_classes_of_a_module_are_found(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text("class A: ...\nclass _B: ...\ndef f():\n    class C: ...\n")
    assert public_classes(path) == ["A"]
