"""The conformance kit on the card, and whole generations compared with the reference's."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from parts.running import first_line

from gpu_parts.bench import GpuBench
from transom.contract import Artifact, Limits, Work
from transom.graph import Graph
from transom.reference.executor import Executor
from transom.reference.session import ReferenceSession
from transom.sparsity import Sparsity
from transom.testing import CheckResult
from transom.testing import run as conform
from transom.testing.models import tiny_decoder
from transom_cuda_triton import CudaTriton

RESERVE = 25.0
"""Seconds of the part that are reserved for generations."""
QUICK = (
    ("logits.gqa", "step.top_k", "step.forms", "state.copy_on_write", "state.truncate"),
    ("logits.int4", "logits.everything", "step.ragged", "sparsity.*"),
)
"""Checks that find most run first: each model takes seconds to compile. The others follow while there is time."""
TOY = ("logits.gqa",)
HANGS = 0.02
"""Largest share of keys that may differ because a choice depends on rounding."""
SPARSE = Sparsity(0.5, columns=0, dense_below=64, local_window=64)
"""Without columns, since the reference keeps no queries for decoding."""


class _Enough(Exception):
    """The time of the kit is up."""


def run(bench: GpuBench) -> None:
    precisions = {"float32": "exact"} if bench.dry else {"float16": "f16", "bfloat16": "bf16"}
    if bench.card.arch < 80:
        precisions.pop("bfloat16", None)
    for i, (long, short) in enumerate(precisions.items()):
        _conformance(bench, long, short, (bench.clock.left - RESERVE) / (len(precisions) - i))
    for weights in ("float32",) if bench.dry else ("float32", "int4"):
        _generation(bench, weights)


def _conformance(bench: GpuBench, precision: str, option: str, seconds: float) -> None:
    """As many checks as time allows: those in QUICK first."""
    name = f"conformance, {precision}"
    ends = bench.clock.now + seconds
    done: set[str] = set()
    passed: list[bool] = []

    def note(result: CheckResult, number: int, count: int) -> None:
        if result.name not in done:
            done.add(result.name)
            outcome = "left out" if result.outcome == "refused" else result.outcome
            bench.check(f"{name}: {result.name}", outcome, result.reason, result.error, loud=outcome == "failed")
            passed.append(outcome == "passed")
        if bench.clock.now > ends:
            raise _Enough

    try:
        for only in (TOY,) if bench.dry else QUICK if bench.quick else (*QUICK, ()):
            conform(
                CudaTriton(), bench.card.host, seed=bench.seed, precision=precision, options={"precision": option},
                only=only, report=note,
            )  # fmt: skip
    except _Enough:
        bench.check(name, "left out", f"all but the {len(done)} checks that fit into {seconds:.0f} s")
    except Exception as e:  # noqa: BLE001  a kit that cannot run is a finding
        bench.check(name, "failed", first_line(e))
    if not any(passed):
        bench.check(name, "failed", "nothing passed: each check was refused, failed or had no time")


def _generation(bench: GpuBench, weights: Any) -> None:
    """Prompts of different lengths together and then token by token, dense and by a policy, in float32."""
    rng = np.random.default_rng([bench.seed, 7])
    graph = tiny_decoder(rng, context=400, window=200, sinks=True, weights=weights)
    prompts = [[int(t) for t in rng.integers(0, 61, n)] for n in ((3, 70) if bench.dry else (3, 70, 250))]
    count = 3 if bench.dry else 8
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
        session: Any = None
        try:
            session = _opened(bench, graph, Path(folder))
            for text in ("dense", SPARSE.to_string()):
                name = f"generation, {weights}, {'dense' if text == 'dense' else 'sparse'}"
                ours, our_logits, our_keys = _greedy(session, prompts, count, text)
                theirs, their_logits, their_keys = _greedy(_reference(graph), prompts, count, text)
                others = float(np.abs(our_keys - their_keys).sum() / their_keys.sum())
                if others and text != "dense":  # if a choice depends on rounding, the texts diverge from there
                    outcome = "failed" if others > HANGS else "left out"
                    bench.check(name, outcome, f"{others:.2%} of the keys that were read are others", others)
                    continue
                error = max(
                    float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(our_logits, their_logits, strict=True)
                )
                right = ours == theirs and error < 1e-3
                why = "" if right else f"logits differ by {error:.2g} of the largest; {ours} in place of {theirs}"
                bench.check(name, "passed" if right else "failed", why, error)
            if not bench.dry:
                replays = session._triton.graphs.replays
                why = "" if replays else "no decoding step was replayed as a CUDA graph"
                bench.check(f"generation, {weights}, recorded steps", "passed" if replays else "failed", why)
        except Exception as e:  # noqa: BLE001  on any error, nothing was generated
            bench.check(f"generation, {weights}", "failed", first_line(e))
        finally:
            if session is not None:
                session.close()


def _opened(bench: GpuBench, graph: Graph, folder: Path) -> Any:
    """Compile a graph, store it as the host does, and load it."""
    backend, host = CudaTriton(), bench.card.host
    options = {"precision": "exact"}
    artifact = backend.compile(graph, host, options, lambda stage, share: None)
    files: dict[str, bytes | Path] = {}
    for name, content in artifact.files.items():
        files[name] = folder / name
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    return backend.load(Artifact(files, artifact.requires), host, options, folder)


def _reference(graph: Graph) -> ReferenceSession:
    assert graph.decoder is not None
    limits = Limits(max_sequences=8, max_tokens=1024, context=graph.decoder.context, page_tokens=0)
    return ReferenceSession(Executor(graph, keep_weights=True), graph.decoder, limits)


def _greedy(session: Any, prompts: list[list[int]], count: int, policy: str) -> tuple[list[list[int]], list[Any], Any]:
    """The continuations of a batch of prompts, the logits of each step, and the keys that were read."""
    states = [session.new_state() for _ in prompts]
    texts: list[list[int]] = [[] for _ in prompts]
    steps, logits = prompts, []
    for _ in range(count):
        works = [Work(s, t, sparsity=policy) for s, t in zip(states, steps, strict=True)]
        logits.append(np.stack([np.asarray(row) for row in session.step(works)]))
        steps = [[int(np.argmax(row))] for row in logits[-1]]
        for text, new in zip(texts, steps, strict=True):
            text.extend(new)
    keys = np.stack([np.asarray(session.keys_read(state)) for state in states])
    for state in states:
        state.free()
    return texts, logits, keys
