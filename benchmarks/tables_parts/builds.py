"""The table of `rtx_build.py`: time, memory and size of engines that are built without a card."""

from __future__ import annotations

from collections.abc import Sequence

from parts.markdown import table
from parts.results import BenchResult

SAMPLE = "sample"
"""The shape that is SmolLM2-135M itself."""


def builds(results: Sequence[BenchResult]) -> list[str]:
    """A row for each build that succeeded."""
    rows = []
    for r in (row for result in results for row in result.rows("builds") if "failed" not in row):
        decode = next(n.removeprefix("decode: ") for n in r["notes"] if n.startswith("decode: "))
        model = "SmolLM2-135M" if r["shape"] == SAMPLE else f"{r['shape']}-shaped, random"
        rows.append((
            model, r["precision"], "sparse" if r["sparse"] else "dense", f"{r['seconds']:.0f} s",
            f"{r['stages']['build']:.0f} s", f"{r['peak_gb']:.1f} GB", f"{r['engine_gb']:.2f} GB", decode,
        ))  # fmt: skip
    head = ("Model", "Precision", "Attention", "Whole build", "Of it TensorRT", "Memory", "Engine", "Decoding a token")
    return table(head, rows)
