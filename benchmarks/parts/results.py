"""The result of a benchmark and its JSON file: the command, the machine, versions, the date, and tables of rows."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import platform
import shlex
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks" / "results"

Row = dict[str, Any]
Tables = dict[str, list[Row]]


@dataclass(frozen=True)
class BenchResult:
    """One run of a benchmark."""

    script: str
    """Name of the script without `.py`."""
    command: list[str]
    """Its arguments, without absolute paths."""
    date: str
    machine: dict[str, Any]
    """`processor`, `cores`, and `instruction_sets`, sorted."""
    versions: dict[str, str]
    tables: Tables
    """Rows by the name of the table; numbers are not rounded."""

    def rows(self, table: str) -> list[Row]:
        return self.tables.get(table, [])

    @property
    def line(self) -> str:
        """The command, to repeat the run."""
        return shlex.join(["python", f"benchmarks/{self.script}.py", *self.command])


def result(tables: Tables, *packages: str, versions: dict[str, str] | None = None) -> BenchResult:
    """The result of this process.

    Args:
        packages: those whose versions matter, in addition to Transom and NumPy.
        versions: of packages in other environments.
    """
    from transom.hardware.cpu import probe_cpu

    cpu = probe_cpu()
    return BenchResult(
        script=Path(sys.argv[0]).stem,
        command=[shared(word) for word in sys.argv[1:]],
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        machine={"processor": cpu.name, "cores": cpu.cores, "instruction_sets": sorted(cpu.features)},
        versions=installed(("transom", "numpy", *packages)) | (versions or {}),
        tables=tables,
    )


def shared(word: str) -> str:
    """An argument as others can use it: an absolute path becomes one from the root of the project, or a file's name."""
    path = Path(word)
    if not path.is_absolute():
        return word
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Versions of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, help="a JSON file for the result; the pages use benchmarks/results/*.json")


def finish(found: BenchResult, out: Path | None, tables: Sequence[str]) -> None:
    """Print the tables of a result and write its file, if one is wanted."""
    print("", *tables, "", about(found), sep="\n")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> BenchResult:
    """The result in a file.

    Raises:
        ValueError: the file is no such result.
    """
    try:
        return BenchResult(**json.loads(path.read_text(encoding="utf-8")))
    except TypeError as e:
        raise ValueError(f"{path} is not the result of a benchmark") from e


SHOWN = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm", "bf16")
"""Instruction sets that the time of a run depends on most."""


def about(found: BenchResult) -> str:
    """The machine, the versions and the date, in a sentence."""
    sets = [name for name in SHOWN if name in found.machine["instruction_sets"]]
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    return (
        f"{found.date} on {found.machine['processor']}, {found.machine['cores']} cores ({', '.join(sets)}): {versions}."
    )


def console(found: Iterable[BenchResult]) -> list[str]:
    """The commands of results, as a block for a page."""
    wrap = textwrap.TextWrapper(112, break_long_words=False, break_on_hyphens=False, subsequent_indent="      ")
    glued = (f"$ {each.line}".replace("--out ", "--out\xa0") for each in found)
    return ["```console", *(" \\\n".join(wrap.wrap(line)).replace("\xa0", " ") for line in glued), "```"]
