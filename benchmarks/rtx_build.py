"""Builds engines where no card is: what they weigh, how long they take, and how much memory.

    python benchmarks/rtx_build.py                         # 1B-shaped, fp8, int8, int4 and f16, for an RTX 4090
    python benchmarks/rtx_build.py --shape tiny --precision fp8
    python benchmarks/rtx_build.py --shape sample --sparse # SmolLM2-135M, its matrices as plain numbers

Each build has a process of its own, so that the most memory that a process has held is that of one build. `memory per
byte of weights` is what `transom_tensorrt.compiling` refuses builds by (`BUILD_BASE`, `BUILD_FACTOR`).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from models import sample_model
from rtx_parts.decoders import changed, plain
from shaped import SHAPES, decoder

from transom.graph import Graph
from transom.graph.sparse import with_sparsity
from transom.sources import resolve
from transom.sparsity import Sparsity

POLICY = Sparsity(1.0, top_k=64, columns=0, max_density=0.6)
SAMPLE = "sample"


def sample() -> tuple[Graph, list[list[int]]]:
    """SmolLM2-135M with plain matrices, and a text."""
    source = resolve(sample_model()).open(sample_model())
    assert source.tokenizer is not None
    return changed(source.graph, plain, "plain"), [source.tokenizer.encode("The capital of France is Paris. " * 30)]


def build(shape: str, precision: str, target: str, context: int, sparse: bool) -> dict[str, Any]:
    """One build, in this process."""
    from transom.hardware.catalogue import catalogue
    from transom_tensorrt import TensorRt

    device = next(d for d in catalogue() if d.id == f"remote:{target}")
    if shape == SAMPLE:
        graph, texts = sample()
    else:
        rng = np.random.default_rng(1)
        graph, texts = decoder(shape, context), [rng.integers(0, SHAPES[shape]["vocabulary"], 64).tolist()]
    if sparse:
        graph = with_sparsity(graph, POLICY)
    options = {"precision": precision, "context": context, "threads": None, "calibration": texts}
    stages: dict[str, float] = {}
    last = ["start", time.perf_counter()]

    def progress(stage: str, share: float | None) -> None:
        now = time.perf_counter()
        stages[str(last[0])] = stages.get(str(last[0]), 0.0) + now - float(last[1])
        last[:] = [stage, now]

    began = time.perf_counter()
    artifact = TensorRt().compile(graph, device, options, progress)
    seconds = time.perf_counter() - began
    network = json.loads(artifact.files["network.json"])  # type: ignore[arg-type]
    engine = artifact.files["engine.plan"]
    assert isinstance(engine, Path)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {
        "shape": shape, "sparse": sparse, "precision": precision, "target": target, "context": network["context"],
        "seconds": round(seconds, 1), "peak_gb": round(peak / 1e9, 2),
        "engine_gb": round(engine.stat().st_size / 1e9, 3), "stages": {k: round(v, 1) for k, v in stages.items()},
        "notes": list(artifact.notes),
    }  # fmt: skip
    engine.unlink()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES, SAMPLE], default="1B")
    parser.add_argument("--sparse", action="store_true", help="with sparse attention, 64 units")
    parser.add_argument("--precision", default="fp8,int8,int4,f16", help="one or several, with commas")
    parser.add_argument("--target", default="rtx-4090")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--out", help="write all of it to this JSON file")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        one = (arguments.shape, arguments.precision, arguments.target, arguments.context, arguments.sparse)
        print(json.dumps(build(*one)))
        return 0
    results = []
    print("precision    build s   peak GB   engine GB")
    for precision in arguments.precision.split(","):
        command = [sys.executable, __file__, "--one", "--shape", arguments.shape, "--precision", precision]
        command += ["--target", arguments.target, "--context", str(arguments.context)]
        command += ["--sparse"] if arguments.sparse else []
        with tempfile.TemporaryDirectory() as folder:
            environment = {**os.environ, "TMPDIR": folder}
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            print(f"{precision:<12} failed: {(done.stderr.strip().splitlines() or ['without a word'])[-1]}")
            results.append({"precision": precision, "failed": done.stderr[-2000:]})
            continue
        result = json.loads(done.stdout.splitlines()[-1])
        results.append(result)
        print(f"{precision:<12} {result['seconds']:>7} {result['peak_gb']:>9} {result['engine_gb']:>11}")
        for note in result["notes"]:
            print(f"    {note}")
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(results, indent=1) + "\n")
    return int(any("failed" in r for r in results))


if __name__ == "__main__":
    sys.exit(main())
