"""The pages of the documentation as data: code blocks with their marks, tables, headings and links.

A code block begins with three backticks, a language, and marks. `python file=x.py` is a file of an example, `python
excerpt=x.py` is copied from a file of the project, and `python no-run` is parsed and not run. `python` without a mark
is run by the tests.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
)
"""Every page, the generated ones included."""

_FENCE = re.compile(r"^```(\S*) ?(.*?)\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """One fenced block of code."""

    page: str
    language: str
    marks: tuple[str, ...]
    text: str
    line: int

    @property
    def file(self) -> str:
        """The file it stands for; empty where it is none."""
        return next((m.removeprefix("file=") for m in self.marks if m.startswith("file=")), "")

    @property
    def excerpt(self) -> str:
        """The file of the project that it is copied from; empty where it is none."""
        return next((m.removeprefix("excerpt=") for m in self.marks if m.startswith("excerpt=")), "")

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path, language: str = "") -> list[Block]:
    """The code blocks of a page, in order; of one language where it is named."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        block = Block(page.name, match[1], tuple(match[2].split()), match[3], line)
        if language in ("", block.language):
            found.append(block)
    return found


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def links(page: Path) -> list[str]:
    """Where the page's links lead, as written."""
    return _LINK.findall(prose(page))


def anchors(page: Path) -> set[str]:
    """The names of a page's headings in links, as GitHub makes them."""
    names = set()
    for heading in _HEADING.findall(prose(page)):
        plain = re.sub(r"[^\w\- ]", "", heading.lower().replace("`", ""))
        names.add(plain.strip().replace(" ", "-"))
    return names


def first_cells(page: Path) -> list[str]:
    """The first cell of each row of the page's tables."""
    rows = [line for line in prose(page).splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [row.strip("|").split("|")[0].strip() for row in rows]
