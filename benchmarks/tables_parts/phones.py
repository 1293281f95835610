"""Tables of `phone.py`, `phone_sparse.py` and `onnx_fidelity.py`: fidelity and bytes of what is exported for phones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from parts.markdown import table
from parts.results import BenchResult, Row


def span(rows: Sequence[Row], name: str, show: Callable[[float], str]) -> str:
    """The least and the largest value, or the one they share; empty without rows."""
    shown = [show(pick(row[name] for row in rows)) for pick in (min, max)] if rows else []
    return " to ".join(dict.fromkeys(shown))


def precisions(results: Sequence[BenchResult]) -> list[str]:
    """A row for each precision of a Hexagon: spans over the texts, the emulator, and the bytes of the contexts."""
    (result,) = results
    agreement = result.rows("agreement")
    rows = []
    for size in result.rows("compiled"):
        rounded, emulated = (
            [row for row in agreement if (row["table"], row["precision"]) == (name, size["precision"])]
            for name in ("rounded", "emulated")
        )
        rows.append([
            f"`{size['precision']}`", span(rounded, "divergence", "{:.4f}".format),
            span(rounded, "same_best", "{:.1%}".format), span(rounded, "cosine", "{:.4f}".format),
            span(emulated, "divergence", "{:.4f}".format), f"{size['bytes'] / 1e6:.1f}",
            f"{size['planned'] / 1e6:.1f}", f"{size['weight_bits']:.2f}",
            f"{size['apart'] / 1e6:.1f}" if size["apart"] else "-",
        ])  # fmt: skip
    head = (
        "`precision`", "Divergence, nats", "Same best token", "Cosine", "Emulated: divergence", "MB", "Planned, MB",
        "Bits a weight", "MB, nothing shared",
    )  # fmt: skip
    return table(head, rows)


def sparse_cost(results: Sequence[BenchResult]) -> list[str]:
    rows = [
        [row["context"], row["attention"], row["operators"], row["keys"], f"{row['megabytes']:.1f}",
         f"{row['nodes']:.1f}" if row["nodes"] else ""]
        for result in results for row in result.rows("cost")
    ]  # fmt: skip
    head = (
        "Context", "Attention", "Operators for a token", "Keys a head reads", "MB of cache for a token",
        "Of which nodes",
    )  # fmt: skip
    return table(head, rows)


def sparse_fidelity(results: Sequence[BenchResult]) -> list[str]:
    """Divergences in nats, a row for each run and text."""
    compared = ("rounded, same policy", "rounded, dense", "reference, dense", "emulated, same policy")
    lines = []
    for result in results:
        (run,) = result.rows("run")
        found = {(row["text"], row["table"]): row for row in result.rows("agreement")}
        for text in dict.fromkeys(text for text, _ in found):
            own = [found.get((text, name)) for name in compared]
            lines.append([
                f"{run['prompt']}, {run['context']}, {run['top_k']}", text, own[0]["tokens"] if own[0] else "",
                *(f"{row['divergence']:.3f}" if row else "" for row in own),
            ])  # fmt: skip
    head = ("Prompt, context, `top_k`", "Text", "Tokens", "Same policy", "Dense", "Policy alone", "Emulated")
    return table(head, lines)


def portable(results: Sequence[BenchResult]) -> list[str]:
    """A row for each precision of a portable ONNX decoder; speeds where they were measured."""
    (result,) = results
    timed = any(row["decode"] for row in result.rows("precisions"))
    rows = []
    for row in result.rows("precisions"):
        speeds = [f"{row['prefill']:.0f}", f"{row['decode']:.0f}"] if timed else []
        rows.append([
            row["weights"], f"`{row['precision']}`", f"{row['megabytes']:.1f}", f"{row['planned']:.1f}",
            f"{row['divergence']:.4f}",
            f"{row['same_best']:.1%}", f"{row['cosine']:.4f}", f"{row['retention']:.3f}", *speeds,
        ])  # fmt: skip
    head = ["Weights", "Precision", "Files, MB", "Planned, MB", "KL, nats", "Same best", "Cosine", "Retention"]
    return table([*head, "Prompt, tokens/s", "Decode, tokens/s"] if timed else head, rows)
