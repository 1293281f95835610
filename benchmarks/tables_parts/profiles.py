"""Tables of `cpu_profile.py`: thread seconds by kind of work, and rates as shares of the machine's peaks."""

from __future__ import annotations

from collections.abc import Sequence

from parts.markdown import table
from parts.results import BenchResult, Row

CHOOSING = ("columns", "routing")
"""Kinds of work that only sparse attention has."""


def runs(result: BenchResult) -> dict[tuple[int, str], list[Row]]:
    """Rows of work by (tokens, sparsity)."""
    found: dict[tuple[int, str], list[Row]] = {}
    for row in result.rows("work"):
        found.setdefault((row["tokens"], row["sparsity"]), []).append(row)
    return found


def thread_seconds(result: BenchResult) -> list[str]:
    found = runs(result)
    head = ["Thread seconds", *(cell for tokens, sparsity in found for cell in (f"{tokens} {sparsity}", "decode"))]
    kinds = [row["kind"] for row in next(iter(found.values()))]
    cells = {
        key: {row["kind"]: (f"{row['prefill']:.4f}", f"{row['decode']:.4f}") for row in rows}
        for key, rows in found.items()
    }
    return table(head, ([kind, *(cell for own in cells.values() for cell in own[kind])] for kind in kinds))


def rates(result: BenchResult) -> list[str]:
    """Operations and bytes per second. `of dense` is dense time x density / sparse time."""
    peaks = {row["kind"]: row["per_second"] for row in result.rows("peaks")}
    dense = {row["tokens"]: row["attention"] for row in result.rows("rates") if row["sparsity"] == "off"}

    def share(value: float, peak: float | None) -> str:
        return "-" if not peak else f"{value / peak:.0%}"

    def products_in(row: Row) -> str:
        return str(row.get("product_arithmetic", "int8"))  # older results do not say: they are all of int8

    rows = [
        [
            str(row["tokens"]), row["sparsity"],
            f"{row['products'] / 1e9:.0f}", products_in(row), share(row["products"], peaks.get(products_in(row))),
            f"{row['attention'] / 1e9:.0f}", row["arithmetic"], share(row["attention"], peaks.get(row["arithmetic"])),
            share(row["attention"], dense.get(row["tokens"])), f"{row['reading'] / 1e9:.1f}",
            share(row["reading"], peaks.get("memory")),
        ]
        for row in result.rows("rates")
    ]  # fmt: skip
    head = (
        "Tokens", "Sparsity", "Products, G/s", "in", "of that peak", "Attention, G/s", "in", "of that peak", "of dense",
        "Decoding reads, GB/s", "of memory's",
    )  # fmt: skip
    return table(head, rows)


def peaks(result: BenchResult) -> list[str]:
    """What a single instruction reaches here; empty if nothing could be compiled."""
    units = {"int8": "operations", "bf16": "operations", "memory": "bytes"}
    rows = [
        [row["kind"], f"{row['per_second'] / 1e9:.0f} billion {units.get(row['kind'], 'operations')}"]
        for row in result.rows("peaks")
    ]
    return table(["Peak", "In a second"], rows) if rows else []


def shares(result: BenchResult) -> list[str]:
    """How the thread seconds of a prompt, and of a token after it, are spent."""
    rows = []
    for (tokens, sparsity), work in runs(result).items():
        for phase in ("prefill", "decode"):
            seconds = {row["kind"]: row[phase] for row in work}
            whole = sum(seconds.values())
            parts = [seconds["matrix products"], seconds["attention"], *(seconds[kind] for kind in CHOOSING)]
            rows.append(
                [str(tokens), sparsity, phase, f"{whole:.3g}"]
                + [f"{part / whole:.0%}" for part in [*parts, whole - sum(parts)]]
            )
    head = ("Tokens", "Sparsity", "Phase", "Thread seconds", "Products", "Attention", "Columns", "Routing", "Rest")
    return table(head, rows)


def whole(results: Sequence[BenchResult]) -> list[str]:
    (result,) = results
    return [*thread_seconds(result), "", *rates(result), "", *peaks(result)]


def summary(results: Sequence[BenchResult]) -> list[str]:
    (result,) = results
    return [*shares(result), "", *rates(result)]
