"""Decoding as one launch: steps of the same shape are recorded once, as a CUDA graph, and replayed.

A decoding step has one new token per sequence. It is padded to one of a few batch sizes with dummy sequences, whose
pages and tokens do not matter. All arrays that its kernels read have fixed addresses; the inputs of a step are copied
there before a replay. Steps in which a sequence selects its columns again, one in 64, are not replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from transom_cuda_triton.step import Planned, TritonStep, Workspace

if TYPE_CHECKING:
    from transom_cuda_triton.engine import TritonEngine
    from transom_cuda_triton.routes import RoutedStep

SIZES = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of sequences in recorded steps."""
Record = Callable[[Callable[[], torch.Tensor]], tuple[Callable[[], None], torch.Tensor]]
"""Runs and records a function. Returns a function that replays it, and the function's result."""


@dataclass
class _Recorded:
    step: TritonStep
    replay: Callable[[], None]
    logits: torch.Tensor


class CudaGraphs:
    """The recorded steps of an engine.

    Args:
        record: records the launches of a function; None: no recording.
    """

    def __init__(self, engine: TritonEngine, record: Record | None) -> None:
        self._engine, self._record = engine, record
        self._known: dict[tuple[int, str], _Recorded] = {}
        self.replays = 0
        """Number of replayed steps so far."""

    def run(self, planned: Planned, routed: RoutedStep | None) -> tuple[TritonStep, torch.Tensor] | None:
        """Replay the step, and return it with its logits; None if it cannot be recorded."""
        sequences = len(planned.counts)
        if self._record is None or sequences > SIZES[-1] or any(n != 1 for n in planned.counts):
            return None
        if len(planned.wanted) != sequences or len(planned.singles) != sequences:
            return None
        if routed is not None and self._engine.routes.chooses(planned, routed):
            return None
        size = next(n for n in SIZES if n >= sequences)
        padded = self._padded(planned, size)
        key = size, "" if routed is None else routed.name
        if key not in self._known:
            self._known[key] = self._recorded(padded, routed)
        recorded = self._known[key]
        self._fill(recorded.step, padded, routed)
        if routed is not None:
            self._engine.routes.begin(planned, routed)
        recorded.replay()
        self.replays += 1
        return recorded.step, recorded.logits[:sequences]

    def _padded(self, planned: Planned, size: int) -> Planned:
        missing = size - len(planned.counts)
        most = -(-self._engine.context // 64)
        pages = np.full((size, most), self._engine.spare, np.int32)
        pages[: len(planned.pages), : planned.pages.shape[1]] = planned.pages
        rows = np.arange(size, dtype=np.int32)
        positions = np.pad(planned.positions, (0, missing))
        blocks = np.stack([rows, rows, positions, np.ones(size, np.int32)], 1).astype(np.int32)
        return Planned(
            np.pad(planned.ids, (0, missing)), positions, rows.astype(np.int64), pages, blocks, blocks[:0], blocks,
            (*planned.lengths, *[1] * missing), (*planned.counts, *[1] * missing),
        )  # fmt: skip

    def _recorded(self, planned: Planned, routed: RoutedStep | None) -> _Recorded:
        engine = self._engine
        assert self._record is not None
        size = len(planned.counts)
        step = engine.laid_out(planned, Workspace(engine.program, size, size, engine.device))
        for part in step.parts:
            part.most_keys = engine.context  # for every later length
        if routed is not None:
            step.routing = engine.routes.of(step, planned, _filled_up(routed, size), remembered=size)
        replay, logits = self._record(lambda: engine.compute(step))
        return _Recorded(step, replay, logits)

    def _fill(self, step: TritonStep, planned: Planned, routed: RoutedStep | None) -> None:
        """Copy the inputs of a step into the arrays of a recorded one."""
        arrays = [
            (step.ids, planned.ids), (step.positions, planned.positions), (step.pages, planned.pages),
            (step.appended, planned.appended), *((part.blocks, planned.singles) for part in step.parts),
        ]  # fmt: skip
        if routed is not None and step.routing is not None:
            arrays += self._engine.routes.fresh(step.routing, planned, _filled_up(routed, len(planned.counts)))
        for to, array in arrays:
            to.copy_(torch.from_numpy(np.ascontiguousarray(array)), non_blocking=True)


def _filled_up(routed: RoutedStep, size: int) -> RoutedStep:
    """Pad with dummy sequences."""
    return replace(routed, routes=(*routed.routes, *[None] * (size - len(routed.routes))))


def cuda_record(compute: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
    """Record on a card: run once on a side stream, to initialize libraries, and then capture."""
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        compute()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = compute()
    return graph.replay, logits
