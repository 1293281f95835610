"""Tables of `cpu_engines.py`: medians over the rounds, and ratios to the best peer."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from parts.markdown import table
from parts.results import BenchResult, Row

NAMES = {
    "transom": "Transom", "transom-openvino": "Transom through OpenVINO", "openvino-genai": "openvino-genai",
    "llama-cpp-python": "llama-cpp-python, flash attention",
}  # fmt: skip
AT_LEVEL = "transom@"
"""Begins the name of Transom with a level of its native library."""


def name_of(engine: str) -> str:
    """The engine and its sparse setting in words."""
    name, _, sparsity = engine.partition(" ")
    if name.startswith(AT_LEVEL):
        return f"Transom with the level `{name.removeprefix(AT_LEVEL)}`"
    return f"{NAMES[name]}, `{sparsity}`" if sparsity else NAMES[name]


def medians(result: BenchResult) -> dict[str, Row]:
    """Medians of the measurements of each engine, in SI units."""
    rounds: dict[str, list[Row]] = {}
    for row in result.rows("rounds"):
        rounds.setdefault(row["engine"], []).append(row)
    return {
        engine: {
            name: statistics.median(row[name] for row in rows) for name in rows[0] if name not in ("engine", "round")
        }
        for engine, rows in rounds.items()
    }


def lengths(result: BenchResult) -> list[int]:
    """Lengths of the prompts."""
    return [int(name.split()[1]) for name in result.rows("rounds")[0] if name.startswith("prefill ")]


def is_transom(engine: str) -> bool:
    """Whether it is Transom with its native library."""
    return engine.partition(" ")[0] == "transom" or engine.startswith(AT_LEVEL)


def best_peer_ratio(found: dict[str, Row], engine: str, measurement: str) -> float:
    """The best other program, over one of Transom's settings."""
    peers = [row[measurement] for name, row in found.items() if not is_transom(name)]
    return float(min(peers) / found[engine][measurement])


def engine_rows(result: BenchResult, *, ratios: bool = True) -> list[list[str]]:
    """The head; a row for each engine; then, for each setting of Transom, the best peer over it."""
    found = medians(result)
    columns: list[tuple[str, str, Callable[[float], str]]] = [
        *((f"prefill {n}", f"{n} tokens, s", "{:.2f}".format) for n in lengths(result)),
        *((f"decode {n}", f"Decode at {n}, ms", lambda s: f"{s * 1e3:.1f}") for n in lengths(result)),
        ("resident", "Resident, MB", lambda b: f"{b / 1e6:.0f}"),
    ]
    if sum(row["engine"] == "transom" for row in result.rows("rounds")) > 2:  # in the first round it may compile
        columns.append(("load", "Load, s", "{:.2f}".format))
    rows = [[name_of(e), *(shown(row[name]) for name, _, shown in columns)] for e, row in found.items()]
    ours = [engine for engine in found if is_transom(engine)]
    if ratios and 0 < len(ours) < len(found):
        rows += [
            [f"best peer / {name_of(e)}", *(f"{best_peer_ratio(found, e, name):.2f}" for name, *_ in columns)]
            for e in ours
        ]
    return [["Engine", *(title for _, title, _ in columns)], *rows]


def engine_table(result: BenchResult, *, ratios: bool = True) -> list[str]:
    head, *rows = engine_rows(result, ratios=ratios)
    return table(head, rows)


def comparison(results: Sequence[BenchResult]) -> list[str]:
    return engine_table(results[0])


def by_model(results: Sequence[BenchResult]) -> list[str]:
    """The same for several models; `-` for a length that was not measured with one of them."""
    tables = [(model_of(result), engine_rows(result)) for result in results]
    head = max((head for _, (head, *_) in tables), key=len)
    rows = [
        [model, *(dict(zip(own, row, strict=True)).get(title, "-") for title in head)]
        for model, (own, *found) in tables
        for row in found
    ]
    return table(["Model", *head], rows)


def model_of(result: BenchResult) -> str:
    """Name of the file, without its ending."""
    return Path(result.command[result.command.index("--model") + 1]).stem


def measured_only(results: Sequence[BenchResult]) -> list[str]:
    """Without ratios."""
    return engine_table(results[0], ratios=False)


def through_openvino(results: Sequence[BenchResult]) -> list[str]:
    """OpenVINO over the native kernels, by length, for Transom alone."""
    (result,) = results
    found, prompts = medians(result), lengths(result)
    rows = [
        [what, *(f"{best_peer_ratio(found, 'transom', f'{key} {n}'):.2f}" for n in prompts), ""]
        for what, key in (("Prefill", "prefill"), ("Decode", "decode"))
    ]
    rows.append(["Resident", *[""] * len(prompts), f"{best_peer_ratio(found, 'transom', 'resident'):.2f}"])
    return table(["OpenVINO / native", *(f"{n} tokens" for n in prompts), "Process"], rows)


def by_length(results: Sequence[BenchResult]) -> list[str]:
    """Each engine at each length, with the time for one token of the prompt."""
    (result,) = results
    rows = [
        [
            name_of(engine), str(n), f"{row[f'prefill {n}']:.1f}", f"{row[f'prefill {n}'] / n * 1e3:.2f}",
            f"{row[f'decode {n}'] * 1e3:.1f}",
        ]
        for engine, row in medians(result).items()
        for n in lengths(result)
    ]  # fmt: skip
    return table(["Engine", "Tokens", "Prompt, s", "For each of its tokens, ms", "Decode, ms"], rows)
