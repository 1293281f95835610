"""The rooms of the core import one way, and no vendor's SDK gets in."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import transom
from transom.testing.checks.answers import SDKS as PROBED_SDKS

CORE = Path(transom.__file__).parent
ORDER = (
    "errors", "typed", "signature", "sparsity", "contract", "contract_optional", "artifacts", "plugin_trials",
    "plugins", "hardware", "selection", "ops", "graph", "text", "models", "sources", "programs", "authoring",
    "sessions", "reference", "quantize", "generation", "preparation", "loading", "bundles", "api", "evaluation",
    "testing", "cli",
)  # fmt: skip
"""A room may import those before it. A new room has to be given its place here."""

FRONT = {"__init__", "__main__"}
"""The package itself, which belongs to no room."""
SDKS = PROBED_SDKS | {"transformers", "mobius", "optimum", "onnxscript"}
MAY_IMPORT_SDKS = {
    "sources/torch.py", "sources/torch_decoder.py", "sources/mobius.py", "evaluation/verify.py",
    "hardware/openvino_query.py",  # a script that runs in a process of its own, to ask about Intel's GPUs and NPUs
}  # fmt: skip
ONNX = {"onnx", "onnx_ir", "sympy"}
BACKENDS = {"transom_openvino_cpu", "transom_cuda_triton", "transom_tensorrt", "transom_mobile_export"}


@dataclass(frozen=True)
class Import:
    file: str
    line: int
    module: str
    for_types: bool
    """Under `if TYPE_CHECKING:`: it does not happen when the program runs."""

    def __str__(self) -> str:
        return f"core/transom/{self.file}:{self.line} imports {self.module}"


def imports_of(path: Path) -> Iterator[Import]:
    file = path.relative_to(CORE).as_posix()
    package = ["transom", *path.relative_to(CORE).parent.parts]

    def visit(node: ast.AST, for_types: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            inside = for_types
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                for statement in child.body:
                    yield from found(statement, True)
                    yield from visit(statement, True)
                for statement in child.orelse:
                    yield from found(statement, for_types)
                    yield from visit(statement, for_types)
                continue
            yield from found(child, inside)
            yield from visit(child, inside)

    def found(node: ast.AST, for_types: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, alias.name, for_types)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package[: len(package) - node.level + 1], base]).rstrip(".")
            if base == "transom":  # `from transom import hardware`
                yield from (Import(file, node.lineno, f"transom.{a.name}", for_types) for a in node.names)
            else:
                yield Import(file, node.lineno, base, for_types)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), False)


FILES = sorted(p for p in CORE.rglob("*.py"))
EVERY = [i for p in FILES for i in imports_of(p)]


def room_of(file: str) -> str:
    return file.split("/")[0].removesuffix(".py")


def test_every_room_has_its_place_in_the_order() -> None:
    rooms = {room_of(p.relative_to(CORE).as_posix()) for p in FILES} - FRONT
    assert rooms <= set(ORDER), f"give a place to {rooms - set(ORDER)}"
    assert len(ORDER) == len(set(ORDER))


def test_rooms_import_only_what_lies_before_them() -> None:
    wrong = []
    for found in EVERY:
        room, parts = room_of(found.file), found.module.split(".")
        if parts[0] != "transom" or len(parts) < 2 or found.for_types or room in FRONT:
            continue
        if parts[1] in ORDER and ORDER.index(parts[1]) > ORDER.index(room):
            wrong.append(str(found))
    assert not wrong, "\n".join(wrong)


def test_core_imports_no_vendor_sdk() -> None:
    wrong = [
        str(i) for i in EVERY
        if i.module.split(".")[0] in SDKS and not i.for_types and i.file not in MAY_IMPORT_SDKS
    ]  # fmt: skip
    assert not wrong, "\n".join(wrong)


def test_core_imports_no_backend_but_through_entry_points() -> None:
    wrong = [str(i) for i in EVERY if i.module.split(".")[0] in BACKENDS]
    assert not wrong, "\n".join(wrong)


def test_files_that_may_import_an_sdk_do_so_when_called_and_not_when_imported() -> None:
    for file in MAY_IMPORT_SDKS:
        body = ast.parse((CORE / file).read_text(encoding="utf-8")).body
        top = [n for n in body if isinstance(n, (ast.Import, ast.ImportFrom))]
        names = {a.name.split(".")[0] for n in top if isinstance(n, ast.Import) for a in n.names}
        names |= {(n.module or "").split(".")[0] for n in top if isinstance(n, ast.ImportFrom)}
        assert not names & SDKS, file


def loaded_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sorted({{m.partition('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("import transom", {*SDKS, "numpy", "onnx", "onnx_ir", "tokenizers", "gguf", "rich", "jinja2", "pluggy"}),
        ("from transom.plugins import load_plugins; load_plugins()", {*SDKS, "numpy", "onnx", "onnx_ir"}),
        ("import transom.contract, transom.errors, transom.signature", {*SDKS, "numpy", "onnx", "onnx_ir"}),
        ("import transom.sparsity", {*SDKS, "numpy", "onnx", "onnx_ir", "pluggy"}),
        ("import transom.selection", {*SDKS, "numpy", "onnx", "onnx_ir"}),
        ("import transom.graph.graph, transom.reference.executor, transom.sessions", SDKS),
        ("import transom.graph", {*ONNX, "numpy"}),
        ("import transom.graph.weights", ONNX),
        ("from transom.models import families; families()", ONNX),
        ("from transom.sources import sources; list(sources())", {*SDKS, *ONNX}),
        ("import transom.testing.runner", SDKS | {"pytest"}),
    ],
)
def test_importing_loads_nothing_heavy(statement: str, forbidden: set[str]) -> None:
    assert not loaded_after(statement) & forbidden


def test_reader_of_imports_sees_all_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test of the test: an import in a function, a relative one, one under TYPE_CHECKING."""
    import sys as _sys

    module = _sys.modules[__name__]
    monkeypatch.setattr(module, "CORE", tmp_path)
    (tmp_path / "ops").mkdir()
    path = tmp_path / "ops" / "x.py"
    path.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import torch\nelse:\n    import jax\n"
        "def f():\n    from transom.graph import Graph\n"
        "    from ..generation import engine\n    import openvino as ov\n"
        "from transom import sources\n"
    )
    found = {(i.module, i.for_types) for i in imports_of(path)}
    assert found == {
        ("typing", False), ("torch", True), ("jax", False), ("transom.graph", False), ("transom.generation", False),
        ("openvino", False), ("transom.sources", False),
    }  # fmt: skip
