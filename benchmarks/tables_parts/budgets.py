"""The table of `cpu_budget.py`: what happens to a long prompt under each memory budget."""

from __future__ import annotations

from collections.abc import Sequence

from parts.markdown import table
from parts.results import BenchResult


def budgets(results: Sequence[BenchResult]) -> list[str]:
    (result,) = results
    rows = [
        [f"{row['gib']:g}", "refused before anything is read", "", ""]
        if row["refused"]
        else [f"{row['gib']:g}", f"{row['tokens']} tokens", f"{row['seconds']:.1f}", f"{row['resident'] / 1e6:.0f}"]
        for row in result.rows("budgets")
    ]
    return table(["Budget, GiB", "Outcome", "Time, s", "Most resident, MB"], rows)
