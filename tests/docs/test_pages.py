"""The pages agree with the code about files, commands, variables, rooms and messages."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
from doc_pages import PAGES, ROOT, Block, anchors, blocks, first_cells, links, prose

README, ENVIRONMENT, ARCHITECTURE, API = (
    ROOT / name for name in ("README.md", "docs/environment.md", "docs/architecture.md", "docs/python-api.md")
)
CODE = [p for folder in ("core", "backends") for p in sorted((ROOT / folder).rglob("*.py"))]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
NO_VARIABLES = {"TRANSOM_CONTINUES_HERE"}
"""Texts in the code that look like variables and are none: the marker of an open message in a chat template."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in links(page):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    """Paths from the root, in backticks; those with a placeholder such as `<name>` are not looked for."""
    named = re.findall(r"`((?:core|backends|tests|benchmarks|docs|examples|tools)/[^`<>{}* ]+)`", prose(page))
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_every_page_is_reached_from_the_readme() -> None:
    reached = {(README.parent / link.partition("#")[0]).resolve() for link in links(README)}
    assert set(PAGES) - {README} <= reached


# ----------------------------------------------------------------------------------------------------------- commands
CONSOLE = [(block, line) for page in PAGES for block in blocks(page, "console") for line in block.text.splitlines()]
COMMANDS = [(f"{block} {line}", line.removeprefix("$ ")) for block, line in CONSOLE if line.startswith("$ ")]
INLINE = re.compile(r"`((?:make|transom) [^`]+)`")


def _typed(program: str) -> list[str]:
    """Every command of a program that a page tells people to type."""
    inline = [m for page in PAGES for m in INLINE.findall(page.read_text(encoding="utf-8"))]
    return sorted({c for c in [*(line for _, line in COMMANDS), *inline] if c.split()[0] == program})


@pytest.mark.parametrize("command", _typed("make"))
def test_a_make_command_names_a_target(command: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    variables = set(re.findall(r"^([A-Z]+) \?=", MAKEFILE, re.MULTILINE))
    for word in shlex.split(command, comments=True)[1:]:
        name, sign, _ = word.partition("=")
        assert name in (variables if sign else targets), f"{word} is not in the Makefile"


@pytest.mark.parametrize("command", _typed("transom"))
def test_a_transom_command_is_one(command: str) -> None:
    """Options and arguments are parsed by the real command line; nothing is run."""
    import click

    from transom.cli.app import transom
    from transom.cli.output import release_stdout

    words = shlex.split(command, comments=True)[1:]
    if words[0] in ("VERB", "--help"):
        return
    context = click.Context(transom, info_name="transom")
    found: click.Command | None = transom
    while isinstance(found, click.Group) and words:
        context = click.Context(found, info_name=found.name, parent=context)
        found = found.get_command(context, words.pop(0))
    assert found is not None, f"there is no command for {command}"
    if "--help" in words or isinstance(found, click.Group):
        return
    required = [p for p in found.params if isinstance(p, click.Argument) and p.required]
    words += ["x"] * max(0, len(required) - sum(not w.startswith("-") for w in words))
    try:
        found.make_context(found.name, words)
    finally:
        release_stdout()  # --json keeps standard output for itself


def test_every_verb_is_in_the_readme() -> None:
    from transom.cli.app import COMMANDS as VERBS

    text = README.read_text(encoding="utf-8")
    assert [verb for verb in VERBS if f"transom {verb}" not in text and verb != "completion"] == []


@pytest.mark.parametrize("target", re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[0].split())
def test_every_make_target_is_in_the_readme(target: str) -> None:
    assert f"`make {target}`" in README.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["run", "test"])
def test_make_understands_the_main_targets(name: str) -> None:
    done = subprocess.run(["make", "--dry-run", name], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------- variables, extras, options
def test_environment_variables_in_the_code_are_those_in_the_table() -> None:
    found: set[str] = set()
    for path in [*CODE, ROOT / "Makefile", ROOT / "tests" / "conftest.py", *(ROOT / "benchmarks").glob("*.py")]:
        found |= set(re.findall(r"\b_?TRANSOM_[A-Z_]*[A-Z]\b", path.read_text(encoding="utf-8")))
    table = {cell.strip("`") for cell in first_cells(ENVIRONMENT) if "TRANSOM_" in cell}
    assert table == found - NO_VARIABLES


def test_extras_in_the_readme_are_those_of_the_distribution() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    table = {cell.strip("`") for cell in first_cells(README)}
    assert set(extras) - {"test", "lint", "bench"} <= table


def test_options_of_load_are_in_the_table() -> None:
    import inspect

    from transom import load

    options = [p.name for p in inspect.signature(load).parameters.values() if p.kind is not p.VAR_KEYWORD]
    cells = [cell.strip("`") for cell in first_cells(API)]
    assert [name for name in options if name not in cells] == []


def test_fields_of_sampling_params_are_in_the_table() -> None:
    from transom import SamplingParams

    cells = [cell.strip("`") for cell in first_cells(API)]
    assert [f.name for f in fields(SamplingParams) if f.name not in cells] == []


def test_errors_are_in_the_table() -> None:
    from transom import errors

    kinds = {n for n, v in vars(errors).items() if isinstance(v, type) and issubclass(v, errors.TransomError)}
    assert kinds - {"TransomError"} <= {cell.strip("`") for cell in first_cells(API)}


def test_families_in_the_readme_are_those_in_the_code() -> None:
    from transom.models import families

    cells = {name.strip() for cell in first_cells(README) for name in cell.split(",")}
    assert {family.name for family in families()} <= cells


def test_backends_in_the_readme_are_those_of_the_distribution() -> None:
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["transom.backends"]
    assert set(points) <= {cell.strip("`") for cell in first_cells(README)}


def test_rooms_are_listed_in_the_order_in_which_they_import() -> None:
    tree = ast.parse((ROOT / "tests" / "layers" / "test_imports.py").read_text(encoding="utf-8"))
    (order,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "ORDER"
    )
    cells = [cell.strip("`") for cell in first_cells(ARCHITECTURE)]
    assert [cell for cell in cells if cell in order] == list(order)


# ----------------------------------------------------------------------------------------------------------- messages
def _said() -> str:
    """All text in the code, as it is shown: adjacent literals joined, values as `…`."""
    pieces: list[str] = []
    for path in [*CODE, ROOT / "Makefile"]:
        if path.suffix != ".py":
            pieces.append(path.read_text(encoding="utf-8"))
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                pieces.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                pieces.append("".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values))
    return "\n".join(pieces)


TABLES = {
    README: "## When something goes wrong",
    ROOT / "docs" / "writing-a-backend.md": "## Common mistakes",
}


EXAMPLES = ("reference", "cpu", "SIGILL", "import", "ModuleNotFoundError")
"""Values that a message in a table has as an example, where others would have a `…`."""


@pytest.mark.parametrize("page", TABLES, ids=lambda page: page.name)
def test_messages_in_a_table_are_those_of_the_code(page: Path) -> None:
    section = page.read_text(encoding="utf-8").split(TABLES[page])[1].split("\n## ")[0]
    rows = [line.strip("|").split("|")[0].strip() for line in section.splitlines() if line.startswith("| `")]
    assert len(rows) > 8
    said = _said()
    for row in rows:
        text = row.strip("`")
        for value in EXAMPLES:
            text = re.sub(rf"\b{value}\b", "…", text)
        for part in re.split("…|: ", text):  # a colon may join what two places say
            assert part.strip() in said, f"{page.name}: nothing in the code says {part!r}"


def test_nothing_is_left_unsaid() -> None:
    """Pages hold no mark of something that is still to be written, but for figures that are still to be measured."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"\b(TODO|FIXME|XXX|TBD)\b", text), page.name


def test_blocks_have_a_language() -> None:
    nameless: list[Block] = [b for page in PAGES for b in blocks(page) if not b.language]
    assert nameless == []
