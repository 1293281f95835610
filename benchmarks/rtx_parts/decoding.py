"""Prompts and decoding: models of a few layers, and the cost of the whole model computed from them.

The compared engines take turns. If the card cannot hold all of them, those of one depth take turns, or each runs alone.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from parts.report import Cell, Table
from parts.running import first_line
from shaped import SHAPES

from rtx_parts.bench import BenchModel, RtxBench
from rtx_parts.building import graph_of
from rtx_parts.decoders import FORMS, matrix_bytes
from rtx_parts.depths import BytesRead, separate
from rtx_parts.stored import load
from transom.contract import Session, Work
from transom.errors import TransomError
from transom_tensorrt import sparse
from transom_tensorrt.network import NETWORK_FILE, Network

TO_MATCH, AIM = 28.0, 84.0
"""Tokens per second of one sequence of an 8B model after 16384 tokens, on an RTX 4090: the figure to match, and three
times that."""
MARGIN = 512 << 20
"""Bytes on the card in addition to an engine's file and caches: activations, logits, compiled kernels."""


Kind = tuple[str, bool, int]
"""Form, whether it is sparse, and number of sequences."""


@dataclass(frozen=True)
class TimedWay:
    """A model with a number of sequences, which is timed."""

    model: BenchModel
    sequences: int = 1

    @property
    def kind(self) -> Kind:
        """The same for ways that differ only in depth."""
        return self.model.form, self.model.sparse, self.sequences


@dataclass
class StepTimes:
    """Measured seconds."""

    prompts: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)

    @property
    def prompt(self) -> float:
        return statistics.median(self.prompts)

    @property
    def step(self) -> float:
        return statistics.median(self.steps)


Found = dict[TimedWay, StepTimes]


# measuring ------------------------------------------------------------------------------------------------------------
def slots(sequences: int) -> int:
    """Caches that `sequences` need: forks of a prompt are copied while the prompt's own cache still exists."""
    return sequences + (sequences > 1)


def groups(needs: Mapping[BenchModel, int], free: int) -> list[list[BenchModel]]:
    """Models that are on the card together: all of them, or those of one depth, or each alone.

    Args:
        needs: bytes of each model.
    """
    if sum(needs.values()) <= free:
        return [list(needs)] if needs else []
    by_depth = [[m for m in needs if m.layers == n] for n in sorted({m.layers for m in needs})]
    if all(sum(needs[m] for m in group) <= free for group in by_depth):
        return by_depth
    return [[m] for m in needs]


def _need(folder: Path, count: int) -> int:
    network = Network.from_json((folder / NETWORK_FILE).read_text())
    engine = sum(p.stat().st_size for p in folder.iterdir() if p.is_file())
    caches: int = count * network.slot_bytes
    return engine + caches + MARGIN


def measure(bench: RtxBench, ways: Sequence[TimedWay], found: Found) -> None:
    """Add the times of all ways whose models were built.

    Raises:
        OutOfTime: some could not be measured.
    """
    most: dict[BenchModel, int] = {}
    for way in ways:
        if way.model in bench.built:
            most[way.model] = max(way.sequences, most.get(way.model, 0))
    needs = {model: _need(bench.built[model], slots(count)) for model, count in most.items()}
    for group in groups(needs, bench.card.free):
        bench.clock.need()
        with contextlib.ExitStack() as stack:
            sessions: dict[BenchModel, Session] = {}
            for model in group:
                try:
                    sessions[model] = load(bench.built[model], bench.card.device, slots(most[model]))
                except (TransomError, RuntimeError) as e:
                    bench.check(f"load {model.name}", "failed", first_line(e))
                    continue
                stack.callback(sessions[model].close)
            bench.say(f"together on the card: {', '.join(m.name for m in sessions)}")
            _take_turns(bench, _fitting(bench, ways, sessions), sessions, found)


def _fitting(bench: RtxBench, ways: Sequence[TimedWay], sessions: Mapping[BenchModel, Session]) -> list[TimedWay]:
    """The ways of these models whose sequences all have a cache on the card."""
    fitting = []
    for way in (w for w in ways if w.model in sessions):
        room, _ = sessions[way.model].pages()
        if slots(way.sequences) <= room:
            fitting.append(way)
            continue
        reason = f"the card has room for {room} caches, and {slots(way.sequences)} are needed"
        bench.check(f"{way.sequences} sequences of {way.model.name}", "left out", reason)
    return fitting


def _take_turns(
    bench: RtxBench, ways: Sequence[TimedWay], sessions: Mapping[BenchModel, Session], found: Found
) -> None:
    sizes, rng = bench.sizes, np.random.default_rng(bench.seed)
    prompt = [int(t) for t in rng.integers(0, SHAPES[sizes.shape]["vocabulary"], sizes.tokens)]
    times = {way: StepTimes() for way in ways}
    states: dict[BenchModel, list[Any]] = {}
    for number in _rounds(bench):
        for model, session in _turned(list(sessions.items()), number):
            for state in states.pop(model, []):
                state.free()
            state, seconds = _prompt(session, prompt)
            states[model] = [state]
            for way in (w for w in ways if w.model == model and number):
                times[way].prompts.append(seconds)
    for way in ways:
        held = states[way.model]
        held += [held[0].fork(sizes.tokens) for _ in range(way.sequences - len(held))]
    for number in _rounds(bench):
        for way in _turned(ways, number):
            steps = _decode(sessions[way.model], states[way.model][: way.sequences], sizes.decodes)
            times[way].steps += steps if number else []
    found |= times


def _rounds(bench: RtxBench) -> Iterator[int]:
    """The first round does not count; at least one follows, and more while there is time."""
    for number in range(bench.sizes.rounds + 1):
        if number > 1 and bench.clock.left <= 0:
            return
        yield number


def _turned(things: Sequence[Any], number: int) -> Sequence[Any]:
    at = number % len(things) if things else 0
    return [*things[at:], *things[:at]]


def _prompt(session: Session, tokens: Sequence[int]) -> tuple[Any, float]:
    """A sequence with these tokens, and the seconds of its prefill."""
    state, most = session.new_state(), session.limits.max_tokens
    began = time.perf_counter()
    for at in range(0, len(tokens), most):
        last = at + most >= len(tokens)
        session.step([Work(state, tokens[at : at + most], "last" if last else "none")])
    return state, time.perf_counter() - began


def _decode(session: Session, states: Sequence[Any], count: int) -> list[float]:
    """Seconds of each step of one token per state, greedy sampling included. The states end as they began."""
    lengths = [state.length for state in states]
    tokens, times = [1] * len(states), []
    for _ in range(count):
        began = time.perf_counter()
        rows = session.step([Work(s, [t]) for s, t in zip(states, tokens, strict=True)])
        tokens = [int(np.asarray(row).argmax()) for row in rows]
        times.append(time.perf_counter() - began)
    for state, length in zip(states, lengths, strict=True):
        state.truncate(length)
    return times


# results --------------------------------------------------------------------------------------------------------------
def read_by(bench: RtxBench, way: TimedWay) -> BytesRead:
    """The minimum that a step of one token per sequence reads."""
    sizes, model = bench.sizes, way.model
    graph = graph_of(model, sizes.shape, sizes.context, sizes.policy)
    assert graph.decoder is not None
    caches = graph.decoder.layers
    position = sum(2 * c.kv_heads * (c.head_dim + c.value_dim) for c in caches)
    keys, nodes = sizes.tokens, 0
    if model.sparse:
        chosen = sparse.SparseSizes(sizes.policy, sizes.context)
        keys = min(keys, chosen.far * sizes.policy.unit + chosen.near)
        nodes = sum(2 * 4 * c.kv_heads * chosen.nodes * c.head_dim for c in caches)
    return BytesRead(matrix_bytes(graph), keys, position, nodes, way.sequences)


def _kinds(found: Found) -> list[list[TimedWay]]:
    """Groups of ways that differ only in depth."""
    kinds: dict[Kind, list[TimedWay]] = {}
    for way in found:
        kinds.setdefault(way.kind, []).append(way)
    return list(kinds.values())


def _named(way: TimedWay) -> dict[str, Cell]:
    attention = "sparse" if way.model.sparse else "dense"
    return {"weights": way.model.form, "attention": attention, "sequences": way.sequences}


def _prompt_row(bench: RtxBench, table: Table, way: TimedWay, seconds: float, note: str) -> None:
    named = {name: value for name, value in _named(way).items() if name != "sequences"}
    bench.row(table, **named, layers=way.model.layers, s=seconds, tokens_per_s=bench.sizes.tokens / seconds, note=note)


def _step_row(bench: RtxBench, table: Table, way: TimedWay, seconds: float, note: str) -> None:
    read, bound = read_by(bench, way), bench.bound("copy_bytes_per_second")
    speed = way.sequences / seconds
    marks: dict[str, Cell] = {}
    if way.model.layers == bench.sizes.whole and way.sequences == 1:
        marks = {f"times_{mark:.0f}": speed / mark for mark in (TO_MATCH, AIM)}
    bench.row(
        table, **_named(way), layers=way.model.layers, ms=seconds * 1e3, tokens_per_s=speed, MB_read=read.total / 1e6,
        bound_ms=bound and read.total / bound * 1e3,
        of_the_bound=bench.share(read.total, seconds, "copy_bytes_per_second"), **marks,
        note=f"{note}{'; ' if note else ''}reads {read.arithmetic()}",
    )  # fmt: skip


def report(bench: RtxBench, prompts: Table, steps: Table, found: Found) -> dict[Kind, tuple[float, float]]:
    """Add rows for the measurements and, if there are two depths, for the whole model computed from them.

    Returns:
        For the whole model, by kind: seconds of the prompt and of a step.
    """
    whole: dict[Kind, tuple[float, float]] = {}
    for ways in _kinds(found):
        for way in ways:
            if way.sequences == 1:
                _prompt_row(bench, prompts, way, found[way].prompt, "")
            _step_row(bench, steps, way, found[way].step, "")
            if way.model.layers == bench.sizes.whole:
                whole[way.kind] = found[way].prompt, found[way].step
        if ways[0].kind in whole or len(ways) < 2:
            continue
        every = replace(ways[0], model=replace(ways[0].model, layers=bench.sizes.whole))
        prompt = separate({w.model.layers: found[w].prompt for w in ways})
        step = separate({w.model.layers: found[w].step for w in ways})
        layers = bench.sizes.whole
        if every.sequences == 1:
            _prompt_row(bench, prompts, every, prompt.of(layers), prompt.arithmetic(layers, 1, "s"))
        _step_row(bench, steps, every, step.of(layers), step.arithmetic(layers, 1e3, "ms"))
        whole[every.kind] = prompt.of(layers), step.of(layers)
    return whole


# the parts ------------------------------------------------------------------------------------------------------------
def _tables(bench: RtxBench, what: str) -> tuple[Table, Table]:
    sizes = bench.sizes
    computed = (
        "" if sizes.whole in sizes.depths else
        f" Models of {' and '.join(map(str, sizes.depths))} layers were measured; the line of {sizes.whole} layers is "
        "computed from the cost of a layer and the cost of the rest."
    )  # fmt: skip
    prompts = bench.table(
        f"Prompts of {sizes.tokens} tokens, {what}",
        f"Seconds of a prompt, medians of up to {sizes.rounds} that take turns.{computed}",
    )
    steps = bench.table(
        f"Decoding behind {sizes.tokens} tokens, {what}",
        "Milliseconds of a step, one token of each sequence: median of all steps, logits on the host and greedy "
        f"sampling included.{computed} Bound: the least bytes of matrices and cache that a step reads, over the "
        f"bandwidth. Marks for one sequence: {TO_MATCH:.0f} tokens/s is to be matched, {AIM:.0f} is the aim.",
    )
    return prompts, steps


def _compare(bench: RtxBench, tables: tuple[Table, Table], two: Mapping[str, tuple[float, float]]) -> None:
    (one, before), (other, after) = two.items()
    for table, longer, shorter in zip(tables, before, after, strict=True):
        note = f"{bench.sizes.whole} layers: {one} takes {longer / shorter:.2f} times as long as {other}"
        bench.row(table, note=note)


def dense(bench: RtxBench) -> None:
    """The part: prompts and decoding of one sequence, fp8 and float16 side by side."""
    prompts, steps = _tables(bench, "fp8 beside float16")
    found: Found = {}
    try:
        measure(bench, [TimedWay(BenchModel(form, n)) for n in bench.sizes.depths for form in FORMS], found)
    finally:
        whole = report(bench, prompts, steps, found)
    before, after = (whole.get((form, False, 1)) for form in ("f16", "fp8"))
    if before and after:
        _compare(bench, (prompts, steps), {"float16": before, "fp8": after})


def sparse_and_batches(bench: RtxBench) -> None:
    """The part: sparse attention beside dense, and several sequences, in fp8."""
    sizes = bench.sizes
    prompts, steps = _tables(bench, "fp8, sparse attention and batches")
    steps.about += f" Sparse: {sizes.policy}, dense below {sizes.policy.dense_below} keys."
    ways = []
    for n in sizes.depths:
        model = BenchModel("fp8", n)
        ways += [TimedWay(model), TimedWay(model, sizes.batch), TimedWay(BenchModel("fp8", n, sparse=True))]
    found: Found = {}
    try:
        measure(bench, ways, found)
    finally:
        whole = report(bench, prompts, steps, found)
    one, chosen, many = (whole.get(k) for k in (("fp8", False, 1), ("fp8", True, 1), ("fp8", False, sizes.batch)))
    if one and chosen:
        _compare(bench, (prompts, steps), {"dense": one, "sparse": chosen})
    if one and many:
        more = sizes.batch * one[1] / many[1]
        bench.row(
            steps, note=f"{sizes.whole} layers: {sizes.batch} sequences together give {more:.2f} times the tokens"
        )
