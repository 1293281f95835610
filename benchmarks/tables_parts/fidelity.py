"""Tables of `cpu_fidelity.py` and `cpu_peer_fidelity.py`: what precision and sparse attention cost."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence

from parts.markdown import table
from parts.results import BenchResult, Row

Shown = tuple[str, str, Callable[[float], str]]

KEYS: Shown = ("density", "Keys read", "{:.2f}".format)
RETENTION: Shown = ("retention", "Retention", "{:.3f}".format)
FAR: Shown = ("retention_far", "beyond 1024 tokens", "{:.3f}".format)
DIVERGENCE: Shown = ("divergence", "Mean KL, nats", "{:.4f}".format)
SAME: Shown = ("same_best", "Same best token", "{:.3f}".format)
COSINE: Shown = ("cosine", "Cosine of logits", "{:.4f}".format)


def means(results: Iterable[BenchResult]) -> dict[tuple[int, str, str, str], Row]:
    """Means over the passages, by (tokens, domain, precision, sparsity)."""
    passages: dict[tuple[int, str, str, str], list[Row]] = {}
    for result in results:
        for row in result.rows("texts"):
            passages.setdefault((row["tokens"], row["domain"], row["precision"], row["sparsity"]), []).append(row)
    return {
        key: {
            name: sum(row[name] for row in rows) / len(rows) if all(row[name] is not None for row in rows) else None
            for name, *_ in (KEYS, RETENTION, FAR, DIVERGENCE, SAME, COSINE)
        }
        for key, rows in passages.items()
    }


def cells(row: Row | None, columns: Sequence[Shown]) -> list[str]:
    """The values of a row; `-` for what was not measured."""
    if row is None:
        return ["-"] * len(columns)
    return ["-" if row[name] is None else show(row[name]) for name, _, show in columns]


def every_setting(results: Sequence[BenchResult]) -> list[str]:
    """A row for each text and setting, as measured."""
    columns = (RETENTION, FAR, DIVERGENCE, SAME, COSINE, KEYS)
    rows = [
        [str(tokens), domain, f"{precision}, {sparsity}", *cells(row, columns)]
        for (tokens, domain, precision, sparsity), row in means(results).items()
    ]
    return table(["Tokens", "Text", "Setting", *(title for _, title, _ in columns)], rows)


def presets(results: Sequence[BenchResult]) -> list[str]:
    """Sparsity alone in float32, and beside it the same with the default precision."""
    found = means(results)
    alone, beside = (KEYS, RETENTION, FAR, DIVERGENCE, SAME, COSINE), (RETENTION, DIVERGENCE, SAME)
    exact = {"density": 1.0, "retention": 1.0, "retention_far": 1.0, "divergence": 0.0, "same_best": 1.0, "cosine": 1.0}
    rows = []
    passages = list(dict.fromkeys((t, d) for t, d, *_ in found))
    keys = dict.fromkeys((t, d, s) for t, d, _, s in found)
    for tokens, domain, sparsity in sorted(keys, key=lambda key: (passages.index(key[:2]), key[2] != "off")):
        own = exact if sparsity == "off" else found.get((tokens, domain, "exact", sparsity))
        rows.append(
            [sparsity, domain, *cells(own, alone), *cells(found.get((tokens, domain, "auto", sparsity)), beside)]
        )
    titles = [*(title for _, title, _ in alone), *(f"`auto`: {title[0].lower()}{title[1:]}" for _, title, _ in beside)]
    return table(["Preset", "Text", *titles], rows)


def lengths(results: Sequence[BenchResult]) -> list[str]:
    """Sparsity alone at several lengths."""
    columns = (KEYS, RETENTION, FAR, DIVERGENCE, SAME)
    rows = [
        [str(tokens), sparsity, domain, *cells(row, columns)]
        for (tokens, domain, precision, sparsity), row in sorted(means(results).items(), key=lambda item: item[0][0])
        if precision == "exact"
    ]
    return table(["Tokens", "Preset", "Text", *(title for _, title, _ in columns)], rows)


def precision_alone(results: Sequence[BenchResult]) -> list[str]:
    """The default precision with dense attention."""
    columns = (RETENTION, DIVERGENCE, SAME, COSINE)
    rows = [
        [domain, str(tokens), *cells(row, columns)]
        for (tokens, domain, precision, sparsity), row in means(results).items()
        if (precision, sparsity) == ("auto", "off")
    ]
    return table(["Text", "Tokens", *(title for _, title, _ in columns)], rows)


def by_model(results: Sequence[BenchResult]) -> list[str]:
    """The default precision with dense attention on several models: means, with intervals of 95 % over the passages."""
    lines = []
    for result in results:
        (model,) = (row for row in result.rows("models") if row["precision"] == "auto")
        rows = [r for r in result.rows("texts") if (r["precision"], r["sparsity"]) == ("auto", "off")]
        for domain in dict.fromkeys(row["domain"] for row in rows):
            own = [row for row in rows if row["domain"] == domain]
            figures = [
                interval([row[name] for row in own], digits) for name, digits in (("divergence", 4), ("same_best", 3))
            ]
            kept = sum(row["retention"] for row in own) / len(own)
            lines.append([model["file"], domain, f"{len(own)} × {own[0]['tokens']}", f"{kept:.3f}", *figures])
    return table(["Model", "Text", "Passages × tokens", RETENTION[1], DIVERGENCE[1], SAME[1]], lines)


def interval(values: Sequence[float], digits: int) -> str:
    """The mean, and twice its standard error."""
    mean = statistics.fmean(values)
    error = 2 * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.inf
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def retrieval(results: Sequence[BenchResult], precision: str = "exact") -> list[str]:
    """Two shares of the answers' tokens for each setting: most likely; most likely as in the baseline."""
    rows = [row for result in results for row in result.rows("tasks") if row["precision"] == precision]
    settings = list(dict.fromkeys(row["sparsity"] for row in rows))
    found = {
        (row["tokens"], row["task"], row["answers"], row["sparsity"]): f"{row['right']:.3f}, {row['same']:.3f}"
        for row in rows
    }
    lines = sorted(dict.fromkeys(key[:3] for key in found), key=lambda key: key[0])
    return table(
        ["Tokens", "Task", "Answer tokens", *settings],
        ([tokens, task, n, *(found.get((tokens, task, n, s), "-") for s in settings)] for tokens, task, n in lines),
    )


def peers(results: Sequence[BenchResult]) -> list[str]:
    """Retention of each engine against its own dense attention."""
    rows = [row for result in results for row in result.rows("retention")]
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    found = {(row["tokens"], row["setting"], row["domain"]): f"{row['retention']:.3f}" for row in rows}
    lines = list(dict.fromkeys(key[:2] for key in found))
    return table(
        ["Tokens", "Setting", *(f"{domain[0].upper()}{domain[1:]}" for domain in domains)],
        ([tokens, setting, *(found.get((tokens, setting, d), "-") for d in domains)] for tokens, setting in lines),
    )
