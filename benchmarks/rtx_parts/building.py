"""Builds the engines that are measured, each in its own process."""

from __future__ import annotations

import resource
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from parts.telling import tell
from parts.timing import OutOfTime

from rtx_parts.bench import BenchModel, RtxBench, models
from rtx_parts.card import BACKEND, here
from rtx_parts.children import ask
from rtx_parts.decoders import matrix_bytes, shaped
from rtx_parts.stored import store
from transom.graph import Graph
from transom.graph.sparse import with_sparsity
from transom.sparsity import Sparsity

ON_DISK = 2.5
"""Disk bytes for each byte of weights while an engine is written beside the network that it is built from."""


def graph_of(model: BenchModel, shape: str, context: int, policy: Sparsity) -> Graph:
    graph = shaped(shape, model.layers, context, model.form)
    return with_sparsity(graph, policy) if model.sparse else graph


def run(bench: RtxBench) -> None:
    """The part: builds what the other parts need, and reports what there was no time for."""
    sizes = bench.sizes
    table = bench.table(
        "Builds",
        f"Random {sizes.shape}-shaped decoders for {sizes.context} tokens: codes, their scales and those of inputs "
        "are random, not quantized, which does not affect times. The vocabulary matrix of fp8 is in int8, as always. "
        "Seconds of the whole compile; memory: peak of the process.",
    )
    wanted = models(sizes, bench.parts)
    for number, model in enumerate(wanted):
        try:
            _build(bench, table, model)
        except OutOfTime:
            late = ", ".join(m.name for m in wanted[number:])
            bench.row(table, model=late, note="there was no time to build")
            raise
        except RuntimeError as e:
            bench.check(f"build {model.name}", "failed", str(e))
            bench.row(table, model=model.name, note=str(e)[:300])


def _build(bench: RtxBench, table: Any, model: BenchModel) -> None:
    sizes, folder = bench.sizes, bench.folder / model.name
    needed = ON_DISK * matrix_bytes(graph_of(model, sizes.shape, sizes.context, sizes.policy))
    free = shutil.disk_usage(bench.folder).free
    if needed > free:
        raise RuntimeError(f"it needs {needed / 1e9:.1f} GB of disk and {free / 1e9:.1f} are free: use --scratch")
    found = ask(bench, "build", model=asdict(model), shape=sizes.shape, context=sizes.context,
                policy=sizes.policy.to_dict(), folder=folder)  # fmt: skip
    bench.built[model] = folder
    bench.row(
        table, model=model.name, seconds=found["seconds"], engine_GB=found["bytes"] / 1e9, memory_GB=found["peak"] / 1e9
    )  # fmt: skip
    for note in found["notes"]:
        bench.say(f"  {note}")


def peak() -> int:
    """Peak memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def child(given: dict[str, Any]) -> None:
    """The process of one build."""
    model, folder = BenchModel(**given["model"]), Path(given["folder"])
    device = here(given["dry"]).device
    began = time.perf_counter()
    graph = graph_of(model, given["shape"], given["context"], Sparsity.from_dict(given["policy"]))
    options = {"precision": "f16", "context": None, "threads": None, "calibration": ()}
    artifact = BACKEND.compile(graph, device, options, lambda stage, share: None)
    seconds = time.perf_counter() - began
    size = store(artifact, folder)
    tell({"seconds": seconds, "bytes": size, "peak": peak(), "notes": list(artifact.notes)})
