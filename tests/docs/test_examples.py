"""The code in the documentation runs as it stands."""

from __future__ import annotations

import ast
import textwrap
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from doc_pages import PAGES, ROOT, Block, blocks

PYTHON = [block for page in PAGES for block in blocks(page, "python")]
README, API, BACKEND = (ROOT / name for name in ("README.md", "docs/python-api.md", "docs/writing-a-backend.md"))
RUN = (README, API, ROOT / "docs" / "sparsity.md")


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_is_valid_for_the_oldest_python_and_is_more_than_comments(block: Block) -> None:
    assert ast.parse(block.text, str(block), feature_version=(3, 11)).body


@pytest.mark.parametrize("block", [b for b in PYTHON if b.excerpt], ids=str)
def test_an_excerpt_is_what_the_file_says(block: Block) -> None:
    code = (ROOT / block.excerpt).read_text(encoding="utf-8")
    depths = [textwrap.indent(block.text, " " * 4 * depth) for depth in range(5)]
    assert any(text in code for text in depths), f"{block} is not in {block.excerpt} any more"


def test_the_python_of_the_pages_for_users_runs_from_top_to_bottom(desk: Path, run: Callable[..., str]) -> None:
    for page in RUN:
        code = [b.text for b in blocks(page, "python") if not b.marks]
        assert code, f"{page.name} has no example"
        (desk / f"{page.stem.replace('-', '_')}_example.py").write_text("\n".join(code), encoding="utf-8")
    run("-c", "import README_example, python_api_example, sparsity_example")


def _install(target: Path) -> str:
    """The plugin of `writing-a-backend.md` as pip would leave it; returns the backend's name."""
    files = {b.file: b.text for b in blocks(BACKEND) if b.file}
    project = tomllib.loads(files.pop("pyproject.toml"))["project"]
    for name, text in files.items():
        (target / name).write_text(text, encoding="utf-8")
    info = target / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    points = project["entry-points"]["transom.backends"]
    (info / "entry_points.txt").write_text(
        "[transom.backends]\n" + "".join(f"{name} = {module}\n" for name, module in points.items())
    )
    (name,) = points
    return str(name)


@pytest.fixture
def plugin(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with the example plugin installed, and the name of its backend."""
    folder = tmp_path_factory.mktemp("site")
    return folder, _install(folder)


USE = """
import transom

with transom.load("model.gguf", backend="{name}") as model:
    assert model.report.backend == "{name}" and "passed" in model.report.check, model.report
    assert model.logits("The quick brown fox").shape[0] > 1
    print(model.generate("Hello", max_new_tokens=4).text)
"""


def test_the_example_backend_loads_a_model_and_passes_the_self_check(
    plugin: tuple[Path, str], desk: Path, run: Callable[..., str]
) -> None:
    folder, name = plugin
    snippets = [b.text for b in blocks(BACKEND, "python") if not b.marks]
    (desk / "use.py").write_text("\n".join([USE.format(name=name), *snippets]), encoding="utf-8")
    run("use.py", packages=folder)


@pytest.mark.sweep  # the whole kit
def test_the_example_backend_passes_the_conformance_kit(plugin: tuple[Path, str], run: Callable[..., str]) -> None:
    folder, _ = plugin
    out = run("-m", "pytest", "-q", "-p", "no:cacheprovider", folder / "test_conformance.py", packages=folder)
    assert "passed" in out
    assert "skipped" not in out
