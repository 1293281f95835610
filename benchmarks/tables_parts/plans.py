"""Tables of `phone_plan.py`: which models fit, how small their products would have to be, and published speeds."""

from __future__ import annotations

from collections.abc import Sequence

from parts.markdown import table
from parts.results import BenchResult, Row

GIB = 1 << 30
FORMS = {
    "int4": "`int4`", "4 bit, blocks of 64": "Blocks of 64", "4 bit, blocks of 128": "of 128",
    "4 bit, by rows": "By rows", "4 bit, by rows, vocabulary too": "Vocabulary, too",
    "4 bit, by rows, vocabulary and cache too": "Cache, too",
}  # fmt: skip
"""Forms of a column, and its title."""
LEAST = "4 bit, by rows, vocabulary and cache too"


def total(row: Row) -> int:
    return int(row["weights"] + row["cache"])


def by_shape(result: BenchResult) -> dict[str, dict[str, Row]]:
    """Rows by the model's name and the form."""
    found: dict[str, dict[str, Row]] = {}
    for row in result.rows("forms"):
        found.setdefault(row["model"], {})[row["form"]] = row
    return found


def sizes(results: Sequence[BenchResult]) -> list[str]:
    """Weights and cache in GB and GiB: bold fits the goal in GB, italic only in GiB; bounds of int8 and of 4 bits."""
    (result,) = results
    (goal,) = result.rows("goal")

    def cell(row: Row) -> str:
        size = total(row)
        gb, gib = f"{size / 1e9:.2f}", f"({size / GIB:.2f})"
        if size <= goal["gigabytes"] * 1e9:
            return f"**{gb}** {gib}"
        return f"*{gb}* {gib}" if size <= goal["gigabytes"] * GIB else f"{gb} {gib}"

    rows = [
        [
            model, *(cell(forms[form]) for form in FORMS), f"{forms['int8']['bound']:.1f}",
            f"{forms['int4']['bound']:.1f}", f"{forms[LEAST]['bound']:.1f}",
        ]
        for model, forms in by_shape(result).items()
    ]  # fmt: skip
    bounds = ("Bound of `int8`, tokens/s", "of `int4`", "of the last form")
    return table(["Weights + cache, GB (GiB)", *FORMS.values(), *bounds], rows)


def needed(results: Sequence[BenchResult]) -> list[str]:
    """Bits a number that the products of models that do not fit would have to take, the rest in the smallest form."""
    (result,) = results
    (goal,) = result.rows("goal")
    rows = []
    numbers = {row["model"]: row["numbers"] for row in result.rows("products")}
    for model, forms in by_shape(result).items():
        if total(forms[LEAST]) <= goal["gigabytes"] * GIB:
            continue
        count = numbers[model]
        rest = total(forms[LEAST]) - count // 2
        bits = [f"{(goal['gigabytes'] * unit - rest) * 8 / count:.2f}" for unit in (10**9, GIB)]
        rows.append([model, f"{count / 1e9:.2f}", f"{count / 2e9:.2f}", f"{rest / 1e9:.2f}", *bits])
    head = (
        "Model", "Numbers in products, billions", "At 4 bits, no scales, GB", "The rest in the last form, GB",
        f"Bits a number that fit {goal['gigabytes']:g} GB", f"{goal['gigabytes']:g} GiB",
    )  # fmt: skip
    return table(head, rows)


def published(results: Sequence[BenchResult]) -> list[str]:
    """Published speeds, as shares of the bound of `int4` at the same context."""
    (result,) = results
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(result.rows("published"), key=lambda row: (row["source"], row["target"])):
        groups.setdefault((row["source"], row["target"]), []).append(row)
    lines = [
        [
            source, f"`{target}`", ", ".join(dict.fromkeys(row["model"] for row in rows)),
            " to ".join(dict.fromkeys(f"{pick(r['speed'] / r['bound'] for r in rows):.0%}" for pick in (min, max))),
        ]
        for (source, target), rows in groups.items()
    ]  # fmt: skip
    return table(("Published by", "Chip", "Models", "Share of the bound"), lines)
