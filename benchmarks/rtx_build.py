"""Builds engines without a card, and reports their size, and the time and memory of each build.

    python benchmarks/rtx_build.py                         # 1B-shaped, fp8, int8, int4 and f16, for an RTX 4090
    python benchmarks/rtx_build.py --shape tiny --precision fp8
    python benchmarks/rtx_build.py --shape sample --sparse # SmolLM2-135M, its matrices as plain numbers

Each build has its own process, so the peak memory of a process is that of one build. `transom_tensorrt.compiling`
refuses builds by `memory per byte of weights` (`BUILD_BASE`, `BUILD_FACTOR`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from models import sample_model
from parts.results import add_out, finish, result
from parts.running import OK
from parts.telling import tell, told
from rtx_parts.bench import RtxSizes
from rtx_parts.building import peak
from rtx_parts.card import BACKEND
from rtx_parts.decoders import changed, plain
from shaped import SHAPES, decoder
from tables_parts.builds import SAMPLE, builds

from transom.graph import Graph
from transom.graph.sparse import with_sparsity
from transom.sources import resolve


def sample() -> tuple[Graph, list[list[int]]]:
    """SmolLM2-135M with plain matrices, and a text."""
    source = resolve(sample_model()).open(sample_model())
    assert source.tokenizer is not None
    return changed(source.graph, plain, "plain"), [source.tokenizer.encode("The capital of France is Paris. " * 30)]


def build(shape: str, precision: str, target: str, context: int, sparse: bool) -> dict[str, Any]:
    """One build, in this process."""
    from transom.hardware.catalogue import catalogue

    device = next(d for d in catalogue() if d.id == f"remote:{target}")
    if shape == SAMPLE:
        graph, texts = sample()
    else:
        rng = np.random.default_rng(1)
        graph, texts = decoder(shape, context), [rng.integers(0, SHAPES[shape]["vocabulary"], 64).tolist()]
    if sparse:
        graph = with_sparsity(graph, RtxSizes().policy)
    options = {"precision": precision, "context": context, "threads": None, "calibration": texts}
    stages: dict[str, float] = {}
    last: list[Any] = ["start", time.perf_counter()]

    def progress(stage: str, share: float | None) -> None:
        now = time.perf_counter()
        stages[last[0]] = stages.get(last[0], 0.0) + now - last[1]
        last[:] = [stage, now]

    began = time.perf_counter()
    artifact = BACKEND.compile(graph, device, options, progress)
    seconds = time.perf_counter() - began
    network = json.loads(artifact.files["network.json"])  # type: ignore[arg-type]
    engine = artifact.files["engine.plan"]
    assert isinstance(engine, Path)
    found = {
        "shape": shape, "sparse": sparse, "precision": precision, "target": target, "context": network["context"],
        "seconds": round(seconds, 1), "peak_gb": round(peak() / 1e9, 2),
        "engine_gb": round(engine.stat().st_size / 1e9, 3), "stages": {k: round(v, 1) for k, v in stages.items()},
        "notes": list(artifact.notes),
    }  # fmt: skip
    engine.unlink()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES, SAMPLE], default="1B")
    parser.add_argument("--sparse", action="store_true", help="with sparse attention, 64 units")
    parser.add_argument("--precision", default="fp8,int8,int4,f16", help="one or several, separated by commas")
    parser.add_argument("--target", default="rtx-4090")
    parser.add_argument("--context", type=int, default=4096)
    add_out(parser)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        one = (arguments.shape, arguments.precision, arguments.target, arguments.context, arguments.sparse)
        tell(build(*one))
        return OK
    results = []
    print("precision    build s   peak GB   engine GB")
    for precision in arguments.precision.split(","):
        command = [sys.executable, __file__, "--one", "--shape", arguments.shape, "--precision", precision]
        command += ["--target", arguments.target, "--context", str(arguments.context)]
        command += ["--sparse"] if arguments.sparse else []
        with tempfile.TemporaryDirectory() as folder:
            environment = {**os.environ, "TMPDIR": folder}
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        try:
            built = told(done.returncode, done.stdout, done.stderr)
        except RuntimeError as e:
            print(f"{precision:<12} failed: {e}")
            results.append({"precision": precision, "failed": done.stderr[-2000:]})
            continue
        results.append(built)
        print(f"{precision:<12} {built['seconds']:>7} {built['peak_gb']:>9} {built['engine_gb']:>11}")
        for note in built["notes"]:
            print(f"    {note}")
    made = result({"builds": results}, "tensorrt-rtx")
    finish(made, arguments.out, builds([made]))
    return int(any("failed" in r for r in results))


if __name__ == "__main__":
    sys.exit(main())
