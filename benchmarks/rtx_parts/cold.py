"""Cold starts: from process start to first token, with the engine on disk."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from parts.telling import tell
from parts.timing import OutOfTime

from rtx_parts.bench import BenchModel, RtxBench
from rtx_parts.children import ask

FIRST = [1, 2, 3]
"""Tokens of the prompt."""


def run(bench: RtxBench) -> None:
    """The part: the deepest fp8 model, without and with the runtime's cached kernels."""
    model = BenchModel("fp8", max(bench.sizes.depths))
    table = bench.table(
        "Cold start",
        "Seconds from the start of a process to its first token, with the engine on disk and in the page cache: "
        "medians of processes. Imports: up to the probe; load: the engine to the card, contexts, memory for one "
        "cache; first token: the warm-up, in which kernels are compiled, and one step. TensorRT-RTX compiles kernels "
        "for the card when it first needs them, and the backend keeps them.",
    )
    if model not in bench.built:
        bench.row(table, model=model.name, note="it was not built")
        return
    found: dict[str, list[dict[str, float]]] = {"compiled": [], "kept": []}
    try:
        for _ in range(bench.sizes.starts):
            scratch = Path(tempfile.mkdtemp(dir=bench.folder))
            for runs in found.values():
                runs.append(ask(bench, "cold", folder=bench.built[model], scratch=scratch, began=time.time()))
    except (OutOfTime, RuntimeError) as e:
        bench.row(table, model=model.name, note=str(e)[:300])
        raise
    finally:
        for kernels, runs in found.items():
            if runs:
                medians = {f"{name}_s": statistics.median(r[name] for r in runs) for name in runs[0]}
                bench.row(table, model=model.name, kernels=kernels, processes=len(runs), **medians)


def child(given: dict[str, Any]) -> None:
    """The process of a cold start: what the host does with a stored artifact."""
    from rtx_parts.card import here
    from rtx_parts.stored import load
    from transom.contract import Work

    device = here(given["dry"]).device
    imported = time.time()
    session = load(Path(given["folder"]), device, 1, Path(given["scratch"]))
    loaded = time.time()
    session.step([Work(session.new_state(), FIRST)])
    ended = time.time()
    session.close()
    began = given["began"]
    tell(
        {"imports": imported - began, "load": loaded - imported, "first_token": ended - loaded, "whole": ended - began}
    )  # fmt: skip
