"""How far engines' logits are from the reference's on real text, for SmolLM2-135M with plain matrices and a tiny model.

The packaged checkpoint has 4-bit blocks, which every precision would keep. They are unpacked into float16 first; that
model, computed by the NumPy reference, is the baseline.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from models import sample_model, texts
from parts.report import Table
from parts.telling import tell
from parts.timing import OutOfTime

from rtx_parts.bench import RtxBench
from rtx_parts.card import BACKEND, here
from rtx_parts.children import ask
from rtx_parts.decoders import changed, plain
from rtx_parts.stored import load, store
from transom.errors import OptionError
from transom.graph import Graph
from transom.preparation.agreement import Agreement, compare
from transom.preparation.compiled import EXACT
from transom.preparation.reference_outputs import reference_logits
from transom.preparation.selfcheck import session_logits
from transom.sources import resolve
from transom.testing.models import tiny_decoder
from transom_tensorrt.claims import precision_of
from transom_tensorrt.precision import RtxPrecision

PRECISIONS = ("f16", "fp8", "int8", "int4", "auto")
"""Precisions of the tiny model."""
WRONG = (1.0, 0.5)
"""Mean divergence in nats and correlation of the worst position beyond which quantization is no explanation: a wrong
layer or a garbled cache exceeds them. Without quantization, the limits of a first load apply."""
SMOLLM2, TINY = "SmolLM2-135M", "tiny"
CALIBRATED = 2
"""Calibration texts for the scales of inputs, as long as the checked text."""
TINY_VOCABULARY = 256
"""One token for each byte."""


def run(bench: RtxBench) -> None:
    """The part: both models in every precision."""
    tokens = bench.sizes.checked
    table = bench.table(
        "Fidelity",
        f"Logits at {tokens} positions of Python's documentation, a prompt and three decoded tokens, against the NumPy "
        "reference of the same model with float16 matrices. KL: Kullback-Leibler divergence in nats, mean; same best: "
        f"share of positions with the same best token; correlation: of the worst position. Inputs in fp8 are scaled by "
        f"{CALIBRATED} other passages. The tiny model is random.",
    )
    for name, precisions in ((TINY, PRECISIONS), (SMOLLM2, bench.sizes.precisions)):
        try:
            graph, passages = _model(name, tokens)
        except SystemExit as e:
            bench.row(table, model=name, note=str(e))
            continue
        bench.clock.need()
        data = bench.folder / f"{name}.npz"
        np.savez(data, golden=reference_logits(graph, passages[0]), passages=np.asarray(passages))
        _in_precisions(bench, table, name, precisions, graph, passages, data)


def _in_precisions(
    bench: RtxBench,
    table: Table,
    name: str,
    precisions: Sequence[str],
    graph: Graph,
    passages: list[list[int]],
    data: Path,
) -> None:
    known: dict[RtxPrecision, tuple[str, dict[str, Any]]] = {}
    for asked in precisions:
        what = f"fidelity, {name}, {asked}"
        try:
            precision = precision_of(graph, bench.card.device, _options(asked, len(passages[0]), passages))
        except OptionError as e:
            bench.row(table, model=name, precision=asked, note=e.cause)
            continue
        if precision in known:
            same, found = known[precision]
            _row(bench, table, name, asked, found, f"the engine of {same}")
            continue
        try:
            found = ask(bench, "fidelity", model=name, precision=asked, data=data)
        except RuntimeError as e:
            bench.check(what, "failed", str(e))
            bench.row(table, model=name, precision=asked, note=str(e)[:300])
            continue
        except OutOfTime:
            bench.row(table, model=name, precision=asked, note="there was no time")
            raise
        known[precision] = asked, found
        _row(bench, table, name, asked, found, "")
        _judge(bench, what, found["agreement"], exact=not precision.quantized)


def _row(bench: RtxBench, table: Table, name: str, asked: str, found: dict[str, Any], note: str) -> None:
    agreement = Agreement(**found["agreement"])
    bench.row(
        table, model=name, precision=asked, computes_in=found["precision"], KL=agreement.kl_mean,
        same_best=agreement.top1, correlation=agreement.correlation_min, build_s=found["seconds"], note=note,
    )  # fmt: skip


def _judge(bench: RtxBench, what: str, agreement: dict[str, Any], *, exact: bool) -> None:
    found, (divergence, correlation) = Agreement(**agreement), (EXACT.kl, EXACT.correlation) if exact else WRONG
    right = found.kl_mean <= divergence and found.correlation_min >= correlation
    reason = "" if right else f"{found}; allowed are {divergence} nats and a correlation of {correlation}"
    bench.check(what, "passed" if right else "failed", reason, found.kl_mean)


def _options(precision: str, context: int, passages: Any) -> dict[str, Any]:
    """The options of a load; the first passage is checked, the others are for calibration."""
    texts = [[int(t) for t in p] for p in passages[1:]]
    return {"precision": precision, "context": context, "threads": None, "calibration": texts}


def _model(name: str, tokens: int) -> tuple[Graph, list[list[int]]]:
    """A model with plain matrices, and passages of real text in its tokens.

    Raises:
        SystemExit: the package that contains it is not installed.
    """
    _, text = next(texts())
    count = 1 + CALIBRATED
    if name == TINY:
        ids = list(text.encode()[: count * tokens])
        rng = np.random.default_rng(0)
        graph = tiny_decoder(
            rng, q_heads=8, kv_heads=2, head_dim=64, hidden=512, inner=1024, vocabulary=TINY_VOCABULARY, context=tokens,
            weights="float16",
        )  # fmt: skip
    else:
        source = sample_model()
        opened = resolve(source).open(source)
        assert opened.tokenizer is not None
        ids = opened.tokenizer.encode(text[: 24 * count * tokens])
        graph = changed(opened.graph, plain, "plain")
    return graph, [ids[i * tokens : (i + 1) * tokens] for i in range(count)]


def child(given: dict[str, Any]) -> None:
    """The process of one precision: build, load, and compare with the reference."""
    with np.load(given["data"]) as kept:
        golden, passages = kept["golden"], kept["passages"]
    tokens = len(passages[0])
    graph, _ = _model(given["model"], tokens)
    device = here(given["dry"]).device
    options = _options(given["precision"], tokens, passages)
    began = time.perf_counter()
    artifact = BACKEND.compile(graph, device, options, lambda stage, share: None)
    seconds = time.perf_counter() - began
    folder = Path(given["data"]).with_suffix("") / given["precision"]
    store(artifact, folder)
    session = load(folder, device, 1)
    try:
        agreement = compare(golden, session_logits(session, passages[0].tolist(), BACKEND.name))
    finally:
        session.close()
    precision = next(note.removeprefix("precision: ") for note in artifact.notes if note.startswith("precision: "))
    tell({"agreement": agreement.to_dict(), "seconds": seconds, "precision": precision})
