"""The core names no backend and no source outside their own homes: what it must know of them, it asks through the
contract's optional protocols, or through `transom.sources.base.Source`.

A string that is one of these names, or a path, key or prefix made of one, decides something. Prose may name them, and
so may docstrings: a text with a space in it is prose.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import transom
from transom.sources.resolve import sources

CORE = Path(transom.__file__).parent
ROOT = Path(__file__).parents[2]
OWN = {"reference"}
"""The backend that is a room of the core."""
SOURCES = {source.kind for source in sources()}
WORDS = {"qnn", "htp", "hexagon", "genai", "skel"}
"""Words by which a backend's hardware or file format could be meant."""
HOMES = (
    *("sources", "hardware"),  # a source's own files, with the table of sources; and the catalogue of hardware
    *("text/from_gguf.py", "text/from_hf.py", "text/to_hf.py"),  # texts in the formats that these sources have
)
ALLOWED = {
    "ai.onnx": "ONNX's own operator domains",
    "graph.onnx": "the file in which a neutral graph is stored",
    "transom.sources.torch": "where `transom.TorchSource` is found",
}
"""Literals that are right wherever they are, and why."""
ALLOWED_IN = {
    "bundles/native_libraries.py": {"hexagon"},  # a machine of the ELF format, beside x86 and RISC-V
    "cli/diagnosis.py": {"gguf", "onnx", "onnx-ir", "torch", "mobius", "mobius-onnx"},  # packages with their versions
    "testing/runner.py": {"onnx", "onnx-ir"},  # the same, for a report of the conformance kit
    "testing/documentation.py": {"onnx", "https://onnx.ai/onnx/operators/onnx__"},  # ONNX's own bodies, and their pages
    "testing/checks/answers.py": {"torch", "torch_xla", "tensorrt", "tensorrt_rtx", "hexagon_v73"},  # SDKs, a device
    "preparation/entry.py": {"onnx_ir._symbolic_shapes"},  # a module of the library onnx-ir
    "graph/raising/__init__.py": {"onnx"},  # the family of a decoder whose files name none
}


def backend_names() -> set[str]:
    """Names of our backends, as their entry points and their packages have them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    points = {n: v for n, v in project["entry-points"]["transom.backends"].items() if n not in OWN}
    return {*points, *(value.split(".")[0] for value in points.values())}


@dataclass(frozen=True)
class Literal:
    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"core/transom/{self.file}:{self.line} has {self.text!r}"


def literals_of(source: str, file: str) -> Iterator[Literal]:
    """The strings of a module that are not docstrings, and those of f-strings without a space in them."""
    tree = ast.parse(source)
    prose: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            prose.add(id(node.value))  # a docstring, of a module, class, function or attribute
        if isinstance(node, ast.JoinedStr):
            parts = [part for part in node.values if isinstance(part, ast.Constant)]
            if any(" " in str(part.value) for part in parts):
                prose |= {id(part) for part in parts}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield Literal(file, node.lineno, node.value)


def names_in(text: str, names: set[str]) -> set[str]:
    """The names of which a literal is made: `"qnn"`, `"qnn-{}"`, `"hexagon_"`, `"onnx/model.onnx.data"`, `".gguf"`."""
    if " " in text.strip():
        return set()
    return {name for name in names if re.search(rf"(?<![a-z0-9_]){name}(?![a-z])", text.lower())}


def doors(source: str, file: str) -> list[str]:
    """What a module of the core says that only a backend or a source should know."""
    if file.startswith(HOMES):
        return []
    names, allowed = backend_names() | SOURCES | WORDS, ALLOWED_IN.get(file, set())
    return [
        str(literal)
        for literal in literals_of(source, file)
        if names_in(literal.text, names)
        and literal.text not in allowed
        and not any(literal.text == known or literal.text.startswith(f"{known}.") for known in ALLOWED)
    ]


FILES = {path.relative_to(CORE).as_posix(): path.read_text(encoding="utf-8") for path in sorted(CORE.rglob("*.py"))}


def test_core_names_no_backend_and_no_source_outside_their_homes() -> None:
    found = [door for file, source in FILES.items() for door in doors(source, file)]
    assert not found, "\n".join(found)


def test_each_exception_is_needed() -> None:
    for file, texts in ALLOWED_IN.items():
        there = {literal.text for literal in literals_of(FILES[file], file)}
        assert texts <= there, f"{file}: {texts - there}"
    everywhere = {literal.text for file, source in FILES.items() for literal in literals_of(source, file)}
    assert set(ALLOWED) <= everywhere
    assert all(any(file.startswith(home) for file in FILES) for home in HOMES)


def test_no_room_imports_the_files_of_a_single_source() -> None:
    """`transom.sources`, `base` and `hub` serve every source; `resolve`, `layout` and `finite` know none of them."""
    shared, found = {"base", "hub", "hub_names", "resolve", "layout", "finite"}, []
    for file, source in FILES.items():
        if file.startswith("sources/"):
            continue
        for node in ast.walk(ast.parse(source)):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            parts = (module or "").split(".")
            if parts[:2] == ["transom", "sources"] and len(parts) > 2 and parts[2] not in shared:
                found.append(f"core/transom/{file}:{node.lineno} imports {module}")
    found = [one for one in found if not one.startswith("core/transom/__init__.py")]  # `TorchSource` is a public name
    assert not found, "\n".join(found)


def test_names_are_those_of_the_project() -> None:
    assert {"openvino_cpu", "cuda_triton", "tensorrt", "onnx", "qnn", "transom_mobile_export"} <= backend_names()
    assert {"gguf", "hf", "onnx", "torch", "mobius"} == SOURCES


@pytest.mark.parametrize(
    ("code", "seen"),
    [
        ('if form.format == "qnn":\n    pass', True),
        ('portable = variant["backend"]["name"] == "onnx"', True),
        ('FORMS = {"tensorrt": 1}', True),
        ('name = f"qnn-{target}"', True),
        ('device.arch.startswith("hexagon_")', True),
        ('keys = ("soc_model", "htp_arch")', True),
        ('skeleton = "Skel" in name', True),
        ('path.suffix == ".gguf"', True),
        ('files = {"onnx/model.onnx.data": 1}', True),
        ('match kind:\n    case "hf":\n        pass', True),
        ('import importlib\nimportlib.import_module("transom_mobile_export.qnn")', True),
        ('"""Of "qnn" a word."""', False),
        ('x = 1\n"""`"onnx"`, `"qnn"`."""', False),
        ('message = "Convert it to GGUF with llama.cpp"', False),
        ('message = f"the backend qnn of {name} is not there"', False),
        ('domain = "ai.onnx.ml"', False),
        ('kind = "onnxruntime"', False),
        ('name = "reference"', False),
    ],
)
def test_a_private_door_is_seen(code: str, seen: bool) -> None:
    """The test of the test."""
    assert bool(doors(code, "bundles/made_up.py")) == seen
    assert not doors(code, "sources/made_up.py")
