"""The table of `cold_start.py`: medians of the stages from the start of a process to the first token."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from parts.markdown import table
from parts.results import BenchResult, Row


def stages(results: Sequence[BenchResult]) -> list[str]:
    (result,) = results
    starts: dict[str, list[Row]] = {}
    for row in result.rows("starts"):
        starts.setdefault(row["cache"], []).append(row)
    names = [name for name in result.rows("starts")[0] if name != "cache"]
    rows = [
        [name, *(f"{statistics.median(r[name] for r in own) * 1e3:.0f}" for own in starts.values())] for name in names
    ]
    totals = [[sum(r[name] for name in names) for r in own] for own in starts.values()]
    rows.append(["whole", *(f"{statistics.median(t) * 1e3:.0f}" for t in totals)])
    rows.append(["least to most", *(f"{min(t) * 1e3:.0f} to {max(t) * 1e3:.0f}" for t in totals)])
    return table(["Milliseconds", *(f"{cache} cache, {len(own)} starts" for cache, own in starts.items())], rows)
