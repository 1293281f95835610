"""Results: tables of measured rows, for the terminal, JSON and a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from parts.markdown import table

NO_CARD = "No card has run it yet."

Cell = str | int | float | None
Row = dict[str, Cell]


@dataclass
class Table:
    """Rows with the same columns, or fewer of them. A cell that was not measured is None; `note` has the reason."""

    title: str
    about: str
    """The meaning of the columns, and what the figures are compared with."""
    rows: list[Row] = field(default_factory=list)

    def columns(self) -> list[str]:
        found = list(dict.fromkeys(name for row in self.rows for name in row))
        return [n for n in found if n != "note"] + (["note"] if "note" in found else [])


@dataclass
class PartReport:
    """Results of one part of the run."""

    name: str
    state: str = "running"
    """running; done; cut: its time was up; failed; left out."""
    reason: str = ""
    seconds: float = 0.0
    tables: list[Table] = field(default_factory=list)
    clocks: list[dict[str, Any]] = field(default_factory=list)
    """The card's state at the start, after each row, and at the end."""


@dataclass
class Document:
    """The whole result, as written to JSON."""

    script: str
    """The script that wrote it, `"gpu"` or `"rtx"`."""
    card: dict[str, Any]
    versions: dict[str, Any]
    dry: bool
    command: list[str]
    bounds: dict[str, float] = field(default_factory=dict)
    """The card's measured peaks: copy_bytes_per_second, product_flops."""
    checks: list[dict[str, Any]] = field(default_factory=list)
    parts: list[PartReport] = field(default_factory=list)
    seconds: float = 0.0
    status: int = -1
    """The exit status; -1 while it runs."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def shown(value: Cell) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


def line(row: Row) -> str:
    """A row for the terminal."""
    return "  " + "  ".join(
        f"{name} {shown(value)}" for name, value in row.items() if value is not None and value != ""
    )


def markdown(title: str, about: str, rows: Sequence[Row]) -> list[str]:
    names = Table(title, about, list(rows)).columns()
    cells = ([shown(row.get(name)) if name in row else "" for name in names] for row in rows)
    return [f"#### {title}", "", about, "", *table([name[0].upper() + name[1:] for name in names], cells), ""]


def section(documents: Sequence[dict[str, Any]]) -> str:
    """The section of a script in a page, generated from its results."""
    if not documents:
        return NO_CARD
    return "\n".join(line for found in documents for line in _card(found))


def _card(found: dict[str, Any]) -> list[str]:
    card, versions = found["card"], found["versions"]
    bounds = found["bounds"]
    failed = [c for c in found["checks"] if c["outcome"] == "failed"]
    said = ", ".join(f"{name} {value}" for name, value in versions.items() if value)
    lines = [f"### {card['name']} ({card['arch']})", ""]
    lines.append(f"{said}. {len(found['checks'])} checks of numbers came first, {len(failed)} failed.")
    reached = [
        f"{what} {bounds[name] / size:.0f} {unit}"
        for name, what, size, unit in (
            ("copy_bytes_per_second", "copying on the card reaches", 1e9, "GB/s"),
            ("product_flops", "products of float16", 1e12, "TFLOPS"),
        )
        if name in bounds
    ]
    if reached:
        said = ", ".join(reached)
        lines[-1] += f" {said[0].upper()}{said[1:]}: figures are compared with {'these' if reached[1:] else 'this'}."
    lines[-1] += _clocks([sample for part in found["parts"] for sample in part["clocks"]])
    lines.append("")
    lines += [f"- failed: {c['name']}: {c['reason']}" for c in failed] + ([""] if failed else [])
    for part in found["parts"]:
        for each in part["tables"]:
            if each["rows"]:
                lines += markdown(each["title"], each["about"], each["rows"])
        if part["state"] != "done":
            lines += [f"The part `{part['name']}` is {part['state']}: {part['reason']}", ""]
    return lines


def _clocks(samples: Sequence[dict[str, Any]]) -> str:
    """A sentence on the card's state during the run; empty if unknown."""
    said = []
    for name, unit in (("sm_mhz", "MHz"), ("memory_mhz", "MHz of the memory"), ("celsius", "°C"), ("watts", "W")):
        values = [float(s[name]) for s in samples if name in s]
        if values:
            said.append(f"{min(values):.0f} to {max(values):.0f} {unit}")
    return f" During the run the card had {', '.join(said)}." if said else ""
