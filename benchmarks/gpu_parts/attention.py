"""Attention by the engine's own operator: dense, by lists at a given density, and with a policy's selection.

The operator is `transom_cuda_triton.attention.Attend` over a paged cache, its machine code compiled ahead of time. In
the tables, *efficiency* is dense time x density / sparse time, both of the same operator: 1 if a key in a list costs as
much as a key in sequence.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from parts.report import Table
from parts.running import first_line

from gpu_parts import lists, peers
from gpu_parts.bench import GpuBench
from gpu_parts.timing import Run
from transom.programs.written import AttentionLayer, View
from transom.sparsity import Sparsity
from transom_cuda_triton.attention import Attend
from transom_cuda_triton.compiling import variants_of
from transom_cuda_triton.engine import TritonEngine
from transom_cuda_triton.packing import ALIGNMENT
from transom_cuda_triton.program import TritonOp, TritonProgram
from transom_cuda_triton.routes import Lists, RoutedStep
from transom_cuda_triton.step import TritonStep, Workspace, plan
from transom_cuda_triton.store import TORCH

PAGE = 64
ABOUT = (
    "Median milliseconds of one layer, {heads} heads of {dim} over {kv}, {number}; K and V are paged for ours and "
    "contiguous for the others. {bound}. Density is keys read / keys seen. Efficiency: dense time x density / sparse "
    "time of our own kernel. Fine lists are units of 16 keys and 64 single keys, coarse ones blocks of 128 x 128, "
    "which are the block mask for `flex_attention`. {near} keys before each query block are always read."
)
Operations = Callable[[int, float], float]


class Layered:
    """One attention layer over a cache of random keys, with the engine around it.

    Args:
        tokens: number of tokens in the cache.
        rows: largest number of new tokens of a step.
    """

    def __init__(self, bench: GpuBench, tokens: int, rows: int) -> None:
        sizes, card = bench.sizes, bench.card
        self.bench, self.width = bench, sizes.heads * sizes.head_dim
        kv = sizes.kv_heads * sizes.head_dim
        layer = AttentionLayer(
            sizes.heads, sizes.kv_heads, sizes.head_dim, sizes.head_dim, 0, sizes.head_dim**-0.5, 0.0, -1
        )
        op = TritonOp("attend", self.width, View(3), View(0), View(1), View(2))
        buffers = (self.width, kv, kv, self.width, 16)
        program = TritonProgram(card.number, (op,), (), (), (layer,), buffers, 4, 16, ALIGNMENT, "dense")
        launch = card.launcher(variants_of(program, card.arch), max(0.0, bench.clock.left - 10))
        with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
            weights = Path(folder) / "weights.bin"
            weights.write_bytes(bytes(ALIGNMENT))
            self.engine = TritonEngine(
                program, weights, card.device, launch, arch=card.arch, processors=card.processors,
                context=tokens, slots=1,
            )  # fmt: skip
        pages = -(-tokens // PAGE)
        self.engine.bind_pages(pages)
        (self.cache,) = self.engine.caches
        for tensor in (self.cache.k, self.cache.v):
            tensor.normal_()
        self.cache.means.normal_(std=8**-0.5)
        self.cache.variances.uniform_(0.5, 1.5)
        self.cache.counts.fill_(8)
        self.workspace = Workspace(program, rows, 0, card.device)
        for buffer in self.workspace.buffers[:3]:
            buffer.normal_()
        (operator,) = self.engine.operators
        assert isinstance(operator, Attend)
        self.operator = operator

    def step(self, past: int, new: int, first_page: int = 0) -> TritonStep:
        """A step of one sequence whose pages begin at `first_page`; it writes nothing to the cache."""
        pages = list(range(first_page, first_page + -(-(past + new) // PAGE)))
        planned = plan([np.zeros(new, np.int64)], [past], [pages], [], self.engine.spare)
        return self.engine.laid_out(planned, self.workspace)

    def attend(self, step: TritonStep, drawn: lists.DrawnLists | None) -> Run:
        listed = None if drawn is None else Lists(drawn.arrays)
        (part,) = step.parts
        q, out = (self.workspace.buffers[i][: step.tokens, : self.width] for i in (0, 3))
        return lambda: self.operator._attend(step, part, self.cache, q, out, listed)

    def choose(self, past: int, new: int, policy: Sparsity, *, columns: bool = True) -> tuple[Run, Callable[[], float]]:
        """A policy's choice and the attention over it, as in the engine; and a function for the resulting density.

        Args:
            columns: whether the step chooses columns, as at a page's beginning; otherwise it reads those of the last
                such step.
        """
        pages = list(range(-(-(past + new) // PAGE)))
        planned = plan([np.zeros(new, np.int64)], [past], [pages], [], self.engine.spare)
        step = self.engine.laid_out(planned, self.workspace)
        routes = self.engine.routes
        routes.kept[0]["RING"].normal_()
        route = routes.take()
        routed = RoutedStep(policy=policy, name=policy.to_string(), routes=(route,))
        if not columns:  # the state after a step that has chosen them
            routes.done(planned, routed, [True])
        step.routing = routing = routes.of(step, planned, routed)
        routes.give_back(route)
        (part,) = step.parts
        q, out = (self.workspace.buffers[i][: step.tokens, : self.width] for i in (0, 3))

        def run() -> None:
            routing.reset()
            found = routing.lists(step, part, 0, q)
            self.operator._attend(step, part, self.cache, q, out, found)

        def density() -> float:
            (counted,) = routing.counts(step)
            queries = part.blocks[:, 3].cpu().numpy().astype(float)[:, None]
            read, seen = ((counted[0, i] * queries).sum() for i in (0, 1))
            return float(read / seen)

        return run, density

    def close(self) -> None:
        self.engine.close()


def _about(bench: GpuBench, bound: str) -> str:
    s = bench.sizes
    return ABOUT.format(
        heads=s.heads, dim=s.head_dim, kv=s.kv_heads, number=bench.card.number, bound=bound, near=s.near
    )  # fmt: skip


def _policy(bench: GpuBench, density: float) -> Sparsity:
    below = 128 if bench.dry else 1024
    return Sparsity(coverage=0.99, max_density=density, dense_below=below)


# prompts --------------------------------------------------------------------------------------------------------------
def _flops(bench: GpuBench, length: int, density: float) -> float:
    return 2.0 * length * length * bench.sizes.heads * bench.sizes.head_dim * density


def prefill(bench: GpuBench) -> None:
    """Attention of a whole prompt in one step."""
    sizes = bench.sizes
    table = bench.table(
        "Attention of prompts",
        _about(bench, "The bound is the card's product of matrices, see above; masked halves do not count"),
    )
    most = max(sizes.lengths)
    while True:
        try:
            layered = Layered(bench, most, most)
            break
        except torch.OutOfMemoryError:
            bench.row(table, tokens=most, what="ours", note="the card's memory does not hold it")
            most //= 2
            if most < min(sizes.lengths):
                return
    before: tuple[int, float] | None = None
    try:
        for length in (n for n in sizes.lengths if n <= most):
            if before is not None:
                expected = before[1] * (length / before[0]) ** 2
                if expected * (5 + 3 * len(sizes.densities)) * 4 > bench.clock.left:
                    bench.row(table, tokens=length, what="all", note=f"left out: a run would take {expected:.1f} s")
                    continue
            try:
                before = length, _prompt(bench, table, layered, length)
            except torch.OutOfMemoryError:
                bench.row(table, tokens=length, what="all", note="the card's memory does not hold it")
    finally:
        layered.close()


def _prompt(bench: GpuBench, table: Table, layered: Layered, length: int) -> float:
    """Measure one length; returns the seconds of dense attention."""
    sizes = bench.sizes
    step = layered.step(0, length)
    begin = torch.arange(length // PAGE, device=bench.card.device) * PAGE
    queries = torch.full_like(begin, PAGE)
    dense = layered.attend(step, None)
    runs: dict[str, Run] = {"dense": dense}
    what: dict[str, tuple[str, float]] = {"dense": ("ours, dense", 1.0)}
    coarse = {d: lists.coarse(length, sizes.kv_heads, d, sizes.near, bench.seed, begin.device) for d in sizes.densities}
    for density in sizes.densities:
        drawn = lists.fine(begin, queries, sizes.kv_heads, density, sizes.near, bench.seed)
        for kind, found in (("fine", drawn), ("coarse", coarse[density])):
            runs[f"{kind} {density}"] = layered.attend(step, found)
            what[f"{kind} {density}"] = f"ours, {kind} lists", found.density
    times = bench.timer.interleaved(runs, 1.5)

    def add(said: str, seconds: float | None, density: float, note: str = "", ours: bool = False) -> None:
        flops = _flops(bench, length, density)
        bench.row(
            table, tokens=length, what=said, density=density, ms=seconds and seconds * 1e3,
            TFLOPS=seconds and flops / seconds / 1e12, of_the_bound=bench.share(flops, seconds, "product_flops"),
            efficiency=times["dense"] * density / seconds if ours and seconds and density < 1 else None,
            ours_is_faster_by=None if ours or not seconds else seconds / _ours(times, what, said, density),
            note=note,
        )  # fmt: skip

    for name, seconds in times.items():
        add(what[name][0], seconds, what[name][1], ours=True)
    for density in sizes.densities:
        try:
            run, density_of = layered.choose(0, length, _policy(bench, density))
            seconds = bench.timer.seconds(run, 0.8)
            add("ours, choice and attention", seconds, density_of(), "with the kernels that choose", ours=True)
        except torch.OutOfMemoryError:
            add("ours, choice and attention", None, density, "the card's memory does not hold it", ours=True)
    q, k, v = peers.drawn(bench, length, length)
    for said, density, make in peers.prompts(bench, length, q, k, v, coarse):
        if bench.clock.left < 20 and not bench.dry:
            add(said, None, density, "there was no time")
            continue
        taken, note = _timed(bench, make)
        add(said, taken, density, note)
    return times["dense"]


def _ours(times: dict[str, float], what: dict[str, tuple[str, float]], said: str, density: float) -> float:
    """Our time for the same work as a peer's: dense, or coarse lists of the same density."""
    same = [
        t for name, t in times.items() if name != "dense" and name.startswith("coarse") and what[name][1] == density
    ]
    return same[0] if same and density < 1 else times["dense"]


def _timed(bench: GpuBench, make: Callable[[], Run]) -> tuple[float | None, str]:
    """Median seconds, or None and the reason."""
    try:
        run = make()
        run()
        bench.card.synchronize()
        return bench.timer.seconds(run, 0.8), ""
    except torch.OutOfMemoryError:
        return None, "the card's memory does not hold it"
    except ModuleNotFoundError as e:
        return None, f"{e.name} is not installed"
    except Exception as e:  # noqa: BLE001  other engines may fail in any way; the row has the reason
        return None, first_line(e)[:160]


# decoding -------------------------------------------------------------------------------------------------------------
def decode(bench: GpuBench) -> None:
    """Attention of one new token of one sequence, which is bound by reading keys and values."""
    sizes = bench.sizes
    size = TORCH[bench.card.number].itemsize
    table = bench.table(
        "Attention while decoding",
        _about(bench, "One sequence; calls run in one CUDA graph, each over another cache, so that no keys "
               "are in the L2 cache. The bound is the speed of copying"),
    )  # fmt: skip
    per_token = 2 * sizes.kv_heads * sizes.head_dim * size

    def copies(length: int) -> int:
        return max(1, min(64, sizes.scratch // (per_token * length)))

    pages = max(copies(n) * -(-n // PAGE) for n in sizes.lengths)
    layered = Layered(bench, pages * PAGE, PAGE)
    try:
        for length in sizes.lengths:
            bench.clock.need(5)
            _token(bench, table, layered, length, copies(length), per_token)
    finally:
        layered.close()


def _token(bench: GpuBench, table: Table, layered: Layered, length: int, copies: int, per_token: int) -> None:
    sizes, device = bench.sizes, bench.card.device
    steps = [layered.step(length - 1, 1, i * (length // PAGE)) for i in range(copies)]
    begin, one = (torch.tensor([n], device=device) for n in (length - 1, 1))
    runs = {"dense": bench.timer.recorded([layered.attend(step, None) for step in steps])}
    densities = {"dense": 1.0}
    for density in sizes.densities:
        drawn = lists.fine(begin, one, sizes.kv_heads, density, min(sizes.near, PAGE), bench.seed)
        runs[f"{density}"] = bench.timer.recorded([layered.attend(step, drawn) for step in steps])
        densities[f"{density}"] = drawn.density
    times = {name: t / copies for name, t in bench.timer.interleaved(runs, 0.6, least=5).items()}

    def add(said: str, seconds: float | None, density: float, note: str = "", ours: bool = False) -> None:
        read = per_token * length * density
        bench.row(
            table, tokens=length, what=said, density=density, us=seconds and seconds * 1e6,
            GB_per_s=seconds and read / seconds / 1e9, of_the_bound=bench.share(read, seconds, "copy_bytes_per_second"),
            efficiency=times["dense"] * density / seconds if ours and seconds and density < 1 else None,
            ours_is_faster_by=None if ours or not seconds else seconds / times["dense"], note=note,
        )  # fmt: skip

    for name, seconds in times.items():
        add("ours, dense" if name == "dense" else "ours, fine lists", seconds, densities[name], ours=True)
    for density in sizes.densities:
        for columns, said, note in (
            (True, "ours, columns, choice and attention", "one step in 64 chooses columns"),
            (False, "ours, choice and attention", "the other 63"),
        ):
            run, density_of = layered.choose(length - 1, 1, _policy(bench, density), columns=columns)
            seconds = bench.timer.seconds(bench.timer.recorded([run]), 0.3)
            add(said, seconds, density_of(), note, ours=True)
    caches = [peers.drawn(bench, 1, length) for _ in range(copies)]
    for said, make in peers.tokens(caches):
        taken, note = _timed_all(bench, make, copies)
        add(said, taken, 1.0, note)


def _timed_all(bench: GpuBench, make: Callable[[], list[Run]], copies: int) -> tuple[float | None, str]:
    seconds, note = _timed(bench, lambda: bench.timer.recorded(make()))
    return seconds and seconds / copies, note
