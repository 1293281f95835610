"""A whole model with random weights: prompts and decoding, sparse with int4 weights against dense in float16; memory;
and the time from a process's start to its first token with machine code that was compiled ahead of time."""

from __future__ import annotations

import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from parts.report import Table
from parts.running import first_line
from parts.telling import tell, told

from gpu_parts.bench import GpuBench
from gpu_parts.hollow import Hollow, compiled, fill
from transom.contract import Work
from transom.sparsity import Sparsity
from transom_cuda_triton import names
from transom_cuda_triton.engine import TritonEngine
from transom_cuda_triton.session import MAX_SEQUENCES, MAX_TOKENS, TritonSession
from transom_cuda_triton.step import Workspace

PAGE = 64
MARGIN = 2 << 30
"""Bytes that stay free in addition to weights, cache and buffers."""
COLD_STARTS = 3
RESERVE = 35.0
"""Seconds of the part that are reserved for cold starts."""
SLOWER = 1.5
"""Mean time of a prompt's later steps, relative to the first."""
COMPARED = ("float16, dense", "int4, sparse")
FORMS = ("float16", "int4")


@dataclass
class Open:
    """A model on the card with its sequences."""

    hollow: Hollow
    session: TritonSession
    states: list[Any] = field(default_factory=list)

    @property
    def engine(self) -> TritonEngine:
        engine = self.session._triton
        assert isinstance(engine, TritonEngine)  # one card
        return engine

    def close(self) -> None:
        self.session.close()


def _need(bench: GpuBench, hollow: Hollow, batch: int) -> int:
    """Bytes of a model with `batch` sequences and one more."""
    from transom_cuda_triton.cache import page_bytes

    pages = (batch + 1) * -(-hollow.decoder.context // PAGE) + 1
    buffers = Workspace.nbytes(hollow.program, MAX_TOKENS, MAX_SEQUENCES)
    return hollow.program.weight_bytes + pages * page_bytes(hollow.program) + buffers


def _open(bench: GpuBench, hollow: Hollow, batch: int) -> Open:
    from transom_cuda_triton.graphs import cuda_record
    from transom_cuda_triton.launching import DriverLauncher, InterpretingLauncher
    from transom_cuda_triton.loading import read_codes

    card, files = bench.card, {n: Path(str(p)) for n, p in hollow.artifact.files.items()}
    context = hollow.decoder.context
    launch: Any = InterpretingLauncher() if bench.dry else DriverLauncher(read_codes(files), card.stream)
    engine = TritonEngine(
        hollow.program, files[names.weights_file(0)], card.device, launch, arch=card.arch, processors=card.processors,
        context=context, slots=batch + 1, record=None if bench.dry else cuda_record,
    )  # fmt: skip
    fill(engine.store, hollow.program)
    pages = (batch + 1) * -(-context // PAGE)
    return Open(hollow, TritonSession(engine, hollow.decoder, context=context, pages=pages))


# prompts and decoding -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class DecodeWay:
    """The model and the policy of a row."""

    name: str
    model: Open
    policy: str

    @property
    def key(self) -> str:
        return f"{self.model.hollow.name}, {self.name}"


def _ways(models: Sequence[Open], sparse: str) -> list[DecodeWay]:
    return [DecodeWay(n, m, p) for m in models for n, p in (("dense", "dense"), ("sparse", sparse))]


def _prompt(bench: GpuBench, way: DecodeWay, tokens: list[int]) -> tuple[Any, float]:
    """A sequence with these tokens, and the seconds of its prefill."""
    session = way.model.session
    state = session.new_state()
    card, chunk = bench.card, bench.sizes.chunk
    card.synchronize()
    began = time.perf_counter()
    for at in range(0, len(tokens), chunk):
        last = at + chunk >= len(tokens)
        part = tokens[at : at + chunk]
        session.step([Work(state, part, "last" if last else "none", top_k=1 if last else 0, sparsity=way.policy)])
    card.synchronize()
    return state, time.perf_counter() - began


def _keys(way: DecodeWay, states: Sequence[Any]) -> Any:
    """Keys read so far, and keys seen, over all layers and heads."""
    return sum(np.asarray(way.model.session.keys_read(s)).sum((1, 2)) for s in states)


def _decode(bench: GpuBench, way: DecodeWay, states: Sequence[Any]) -> tuple[float, float]:
    """Seconds of a step of one token per state, and the density; means, since one step in 64 chooses columns."""
    session, rng = way.model.session, np.random.default_rng(1)
    tokens = rng.integers(0, bench.sizes.vocabulary, (bench.sizes.decodes, len(states)))
    lengths, before = [state.length for state in states], _keys(way, states)
    bench.card.synchronize()
    began = time.perf_counter()
    for row in tokens:
        session.step([Work(s, [int(t)], top_k=1, sparsity=way.policy) for s, t in zip(states, row, strict=True)])
    bench.card.synchronize()
    seconds = (time.perf_counter() - began) / len(tokens)
    read, seen = _keys(way, states) - before
    for state, length in zip(states, lengths, strict=True):
        state.truncate(length)
    return seconds, float(read / seen)


def run(bench: GpuBench) -> None:
    """Both models together if the card's memory holds them, otherwise one after the other."""
    sizes = bench.sizes
    folder = Path(tempfile.mkdtemp(prefix="transom-gpu-", dir=bench.folder))
    try:
        hollows: list[Hollow] = []
        for form in FORMS:
            bench.clock.need(30 if not bench.dry else 0)
            hollows.append(compiled(bench, form, folder / form))
            bench.say(f"compiled {form}: {hollows[-1].seconds:.1f} s")
        free = bench.card.free
        fit = [h for h in hollows if _need(bench, h, 1) + MARGIN / 2 < free]
        together = sum(_need(bench, h, 1) for h in hollows) + MARGIN < free
        table = bench.table(
            f"A whole model of random weights at {sizes.end_to_end} tokens",
            f"{sizes.layers} layers of {sizes.hidden} columns, {sizes.heads} heads over {sizes.kv_heads} of "
            f"{sizes.head_dim}, {sizes.inner} inner columns, a vocabulary of {sizes.vocabulary}; "
            f"prompts in steps of {sizes.chunk}, tokens by recorded steps, host time included. "
            "Random weights attend evenly, so the policy is bounded: it reads at most a tenth of the far keys. "
            + ("The ways take turns." if together else "The models are loaded one after the other."),
        )
        for hollow in hollows:
            if hollow not in fit:
                bench.row(table, weights=hollow.name, note="the card's memory does not hold it")
        groups = [fit] if together else [[h] for h in fit]
        found: dict[str, dict[str, float]] = {}
        for i, group in enumerate(groups):
            _group(bench, table, group, found, 1 / (len(groups) - i))
            gc.collect()
            bench.say(f"{bench.card.free / 2**30:.1f} GiB are free")
        _ratios(bench, table, found)
        _memory(bench, hollows)
        _cold(bench, [h for h in fit if h.name == "int4"], folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _affordable(
    bench: GpuBench, table: Table, ways: list[DecodeWay], prompt: list[int], seconds: float
) -> tuple[list[DecodeWay], list[int]]:
    """The ways and the prompt that time allows; on a slow card only the two compared ways, and a shorter prompt.

    The first step of a way is not counted, because libraries initialize in it.
    """
    chunk, steps = bench.sizes.chunk, -(-len(prompt) // bench.sizes.chunk)
    expected: dict[str, float] = {}
    for way in ways:
        for _ in range(2):
            state, took = _prompt(bench, way, prompt[:chunk])
            expected[way.key] = took * steps * SLOWER
            state.free()
    if bench.dry or sum(expected.values()) <= seconds:
        return ways, prompt
    ways = [w for w in ways if w.key in COMPARED] or ways
    whole = len(prompt)
    while sum(expected[w.key] for w in ways) * len(prompt) / whole > seconds and len(prompt) > 2 * chunk:
        prompt = prompt[: len(prompt) // 2]
    if len(prompt) < whole:
        bench.row(table, note=f"a prompt of {len(prompt)} tokens in place of {whole}: there is no time for more")
    return ways, prompt


def _group(
    bench: GpuBench, table: Table, hollows: Sequence[Hollow], found: dict[str, dict[str, float]], share: float
) -> None:
    """Measure models that are on the card together.

    Args:
        share: share of the remaining time.
    """
    sizes = bench.sizes
    spare = bench.card.free - sum(_need(bench, h, 1) for h in hollows) - MARGIN
    each = max(1, sum(_need(bench, h, 2) - _need(bench, h, 1) for h in hollows))
    batch = max(1, min(sizes.batch, 1 + int(spare // each)))
    models: list[Open] = []
    try:
        models = [_open(bench, h, batch) for h in hollows]
        small = {"columns": 8, "dense_below": 64} if bench.dry else {}
        policy = Sparsity(coverage=0.99, max_density=0.1, **small).to_string()  # type: ignore[arg-type]
        ways = _ways(models, policy)
        rng = np.random.default_rng(bench.seed)
        prompt = [int(t) for t in rng.integers(0, sizes.vocabulary, sizes.end_to_end)]
        seconds = (bench.clock.left - RESERVE) * share
        ways, prompt = _affordable(bench, table, ways, prompt, seconds / 2)
        ends = bench.clock.now + seconds
        prompts: dict[str, list[float]] = {w.key: [] for w in ways}
        states: dict[str, Any] = {}
        for _ in range(1 if bench.dry or bench.quick else 2):
            for way in ways:
                if way.key in states:
                    if bench.clock.now + 4 * prompts[way.key][0] > ends:
                        continue
                    states.pop(way.key).free()
                states[way.key], took = _prompt(bench, way, prompt)
                prompts[way.key].append(took)
        for way in ways:
            read, seen = _keys(way, [states[way.key]])
            found[way.key] = {
                "prefill s": statistics.median(prompts[way.key]), "density": float(read / seen),
                "tokens": float(len(prompt)),
            }  # fmt: skip
        # One sequence of each model is kept: the contents of its cache do not affect the time of decoding.
        holders = {w.model.hollow.name: w for w in ways}
        for way in ways:
            if way not in holders.values():
                states.pop(way.key).free()
        own = {name: [states[w.key]] for name, w in holders.items()}
        _decoding(bench, table, ways, own, found, 1)
        each_takes = sum(statistics.median(prompts[w.key]) for w in holders.values())
        time_for = 1 + int(max(0.0, (ends - bench.clock.now) / 2) / max(each_takes, 1e-9))
        more = batch if bench.dry else min(batch, time_for)
        if more > 1:
            for name, way in holders.items():
                own[name] += [_prompt(bench, way, prompt)[0] for _ in range(more - 1)]
            _decoding(bench, table, ways, own, found, more)
        else:
            bench.row(table, note=f"batches are left out: room for {batch} sequences, time for {time_for}")
    finally:
        for model in models:
            model.close()


def _decoding(
    bench: GpuBench, table: Table, ways: Sequence[DecodeWay], states: dict[str, list[Any]],
    found: dict[str, dict[str, float]], batch: int,
) -> None:  # fmt: skip
    """Rounds in which every way decodes on its model's sequences. The first, which captures graphs, is not counted."""
    times: dict[str, list[float]] = {w.key: [] for w in ways}
    densities: dict[str, float] = {}
    for number in range(2 if bench.dry or bench.quick else 4):
        for way in ways:
            seconds, densities[way.key] = _decode(bench, way, states[way.model.hollow.name])
            if number:
                times[way.key].append(seconds)
        if number and bench.clock.left < RESERVE:
            break
    for way in ways:
        seconds = statistics.median(times[way.key])
        found[way.key][f"decode {batch}"] = seconds
        replays, prompt = way.model.engine.graphs.replays, found[way.key]["prefill s"]
        bench.row(
            table, weights=way.model.hollow.name, attention=way.name, sequences=batch,
            prefill_density=found[way.key]["density"], decode_density=densities[way.key],
            prefill_s=prompt, prefill_tokens_per_s=found[way.key]["tokens"] / prompt,
            decode_ms=seconds * 1e3, decode_tokens_per_s=batch / seconds,
            note="" if replays or bench.dry else "no step was replayed as a CUDA graph",
        )  # fmt: skip


def _ratios(bench: GpuBench, table: Table, found: dict[str, dict[str, float]]) -> None:
    base, best = (found.get(name) for name in COMPARED)
    if base is None or best is None or base["tokens"] != best["tokens"]:
        bench.row(table, what="sparse int4 against dense float16", note="they could not both be measured alike")
        return
    for name in base:
        if name not in ("density", "tokens") and name in best:
            bench.row(table, what=f"dense float16 / sparse int4, {name}", ratio=base[name] / best[name])


# memory ---------------------------------------------------------------------------------------------------------------
def _memory(bench: GpuBench, hollows: Sequence[Hollow]) -> None:
    from transom_cuda_triton.cache import page_bytes

    table = bench.table(
        "Memory of the whole model",
        "GiB as the engine lays it out: weights, the cache of one sequence with its nodes, and the buffers of the "
        f"largest step ({MAX_TOKENS} tokens).",
    )
    for h in hollows:
        cache = -(-bench.sizes.end_to_end // PAGE) * page_bytes(h.program)
        weights, buffers = h.program.weight_bytes, Workspace.nbytes(h.program, MAX_TOKENS, MAX_SEQUENCES)
        bench.row(
            table, weights=h.name, weights_GiB=weights / 2**30, cache_GiB=cache / 2**30, buffers_GiB=buffers / 2**30,
            together_GiB=(weights + cache + buffers) / 2**30,
        )  # fmt: skip


# cold start -----------------------------------------------------------------------------------------------------------
def _cold(bench: GpuBench, hollows: Sequence[Hollow], folder: Path) -> None:
    table = bench.table(
        "Cold start",
        "Seconds from the start of a process to its first token, the compiled model on disk and in the page cache, "
        "and nothing compiled in the process: median of a few processes. Imports: up to torch and the backend; "
        "load: weights to the card, machine code to the driver, memory for the cache; first token: one step.",
    )
    if not hollows:
        bench.row(table, note="the card's memory does not hold the model")
    for hollow in hollows:
        runs: list[dict[str, float]] = []
        try:
            for _ in range(1 if bench.dry or bench.quick else COLD_STARTS):
                bench.clock.need(10 if not bench.dry else 0)
                runs.append(_cold_once(bench, hollow, folder))
        except Exception as e:  # noqa: BLE001  also a failed child process, whose message is in the row
            bench.row(table, weights=hollow.name, note=first_line(e)[:300])
            if not runs:
                continue
        medians = {f"{name}_s": statistics.median(r[name] for r in runs) for name in runs[0]}
        bench.row(table, weights=hollow.name, processes=len(runs), **medians)


def _cold_once(bench: GpuBench, hollow: Hollow, folder: Path) -> dict[str, float]:
    script = Path(__file__).resolve().parents[1] / "gpu.py"
    began = time.time()
    command = [sys.executable, str(script), "--child-cold", str(folder / hollow.name), repr(began)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=max(5.0, bench.clock.left), env=dict(os.environ)
    )
    return told(done.returncode, done.stdout, done.stderr)


def child(folder: Path, began: float) -> None:
    """The process of a cold start: what the host does with a stored artifact."""
    from transom import hardware
    from transom.contract import Artifact, Offer
    from transom_cuda_triton import CudaTriton

    backend = CudaTriton()
    devices = hardware.probe_devices()
    offers = {a.device_id for a in backend.probe(devices) if isinstance(a, Offer)}
    device = next(d for d in devices if d.id in offers)
    files: dict[str, bytes | Path] = {p.name: p for p in folder.iterdir() if p.name != "requires.json"}
    artifact = Artifact(files, json.loads((folder / "requires.json").read_text()))
    assert backend.check(artifact, device).state == "ok"
    imported = time.time()
    session = backend.load(artifact, device, {"context": None}, folder)
    loaded = time.time()
    session.step([Work(session.new_state(), [1, 2, 3], top_k=1)])
    ended = time.time()
    session.close()
    tell(
        {"imports": imported - began, "load": loaded - imported, "first_token": ended - loaded, "whole": ended - began}
    )  # fmt: skip
