"""Runs a program on a device: weights, cache, kernels and steps. The session assigns pages to sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from transom.errors import EngineError, option
from transom_cuda_triton import cache
from transom_cuda_triton.attention import Attend
from transom_cuda_triton.graphs import CudaGraphs, Record
from transom_cuda_triton.operators import Operator, operators
from transom_cuda_triton.program import TritonOp, TritonProgram
from transom_cuda_triton.routes import RoutedStep, Routes
from transom_cuda_triton.step import Planned, StepPart, TritonStep, Workspace, plan
from transom_cuda_triton.store import Store
from transom_cuda_triton.variants import Launcher

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Result:
    """The result of a step."""

    logits: torch.Tensor
    """float32 [rows, vocabulary], on the device; the next step may overwrite it."""
    blocks: list[Array]
    """The step's query blocks, BLOCKS int32 [blocks, 4]: those of prompts, then single queries."""
    counts: list[Array] | None
    """For each of `blocks`, int32 [layers, 2, blocks, kv_heads]: keys that the last query read, and keys visible to any
    query. None: every key was read."""


def not_finite(where: str) -> EngineError:
    return EngineError(
        f"{where} computed numbers that are not finite",
        "The model's weights may be damaged, or its activations exceed float16's range: "
        f"try {option('precision', 'bf16')} or 'exact'",
    )


class TritonEngine:
    """Runs a program.

    Args:
        weights: the file of weights that the program refers to.
        arch: 80 for sm_80.
        processors: number of multiprocessors of the card.
        context: maximum tokens of one sequence.
        slots: maximum number of sequences with sparse attention.
        record: records decoding steps, see `CudaGraphs`; None: no recording.
        reduce: replaces a tensor with its sum over all cards, if the program is one card's share.

    Raises:
        EngineError: the files are damaged, or the weights do not fit in the device's memory.
    """

    page_tokens = cache.PAGE

    def __init__(
        self,
        program: TritonProgram,
        weights: Path,
        device: torch.device,
        launch: Launcher,
        *,
        arch: int,
        processors: int,
        context: int,
        slots: int,
        record: Record | None = None,
        reduce: Callable[[torch.Tensor], None] | None = None,
    ) -> None:
        self.program, self.device, self.context = program, device, context
        self.store = Store(program, weights, device, context)
        self.launch, self.reduce = launch, reduce or _alone
        self.operators = engine_operators(program, arch, processors)
        self.routes = Routes(program, slots, context, device, arch=arch, processors=processors)
        self.graphs = CudaGraphs(self, record)
        self.caches: list[cache.LayerPages] = []
        self.spare = 0
        self._workspaces: dict[tuple[int, int], Workspace] = {}

    # pages ------------------------------------------------------------------------------------------------------------
    def page_bytes(self) -> int:
        """Bytes of one page over all layers."""
        return cache.page_bytes(self.program)

    def bind_pages(self, pages: int) -> None:
        """Allocate `pages` pages, and one more for padding."""
        self.spare = pages
        self.caches = cache.allocate(self.program, pages + 1, self.routes.side_pages, self.device)
        self.routes.bind()

    def copy_page(self, source: int, target: int) -> None:
        cache.copy_page(self.caches, source, target)

    def drop_pages(self, pages: Sequence[int]) -> None:
        """Does nothing: the memory stays with the pool."""

    def warm_up(self) -> None:
        """Run one token of no sequence to initialize cuBLAS. The interpreter needs no warm-up."""
        if self.device.type == "cpu":
            return
        try:
            self.step([np.zeros(1, np.int64)], [0], [[self.spare]], [0])
        except RuntimeError as e:  # from torch, if the card does not work
            raise EngineError(f"{self.device} cannot compute: {e}", "See whether nvidia-smi answers") from e

    # steps ------------------------------------------------------------------------------------------------------------
    def step(
        self,
        tokens: Sequence[Array],
        past: Sequence[int],
        pages: Sequence[Sequence[int]],
        rows: Sequence[int],
        routed: RoutedStep | None = None,
    ) -> Result:
        """Run the new tokens of some sequences.

        Args:
            tokens: new token ids of each sequence, int64 [new].
            past: cached tokens of each sequence.
            pages: pages of each sequence, including those for the new tokens.
            rows: indices of the tokens that need logits, among the new tokens of all sequences.
            routed: the sparse attention of the step; None: attention is dense.

        Raises:
            EngineError: attention scores are not finite.
        """
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            return self._step(plan(tokens, past, pages, rows, self.spare), routed)

    def _step(self, planned: Planned, routed: RoutedStep | None) -> Result:
        chose: list[bool] = []
        if routed is not None:
            chose = self.routes.choosing(planned, routed)
        found = self.graphs.run(planned, routed)
        if found is None:
            step = self.laid_out(planned, self._workspace(len(planned.ids), len(planned.wanted)))
            if routed is not None:
                step.routing = self.routes.of(step, planned, routed)
                self.routes.begin(planned, routed)
            found = step, self.compute(step)
        step, logits = found
        counts = None
        if routed is not None and step.routing is not None:
            if not step.routing.finite():
                raise not_finite("The attention of a layer")
            counts = step.routing.counts(step)
            self.routes.done(planned, routed, chose)
        return Result(logits, [b for b in (planned.chunks, planned.singles) if len(b)], counts)

    def compute(self, step: TritonStep) -> torch.Tensor:
        """Launch all operators, and return the logits."""
        if step.routing is not None:
            step.routing.reset()
        for operator in self.operators:
            operator.run(step)
        output = self.program.output
        return step.workspace.buffers[output][: len(step.wanted), : self.program.vocabulary]

    def laid_out(self, planned: Planned, workspace: Workspace) -> TritonStep:
        """Move a planned step to the device."""

        def on_device(array: Array) -> torch.Tensor:
            tensor = torch.from_numpy(np.ascontiguousarray(array))
            return tensor.to(self.device, non_blocking=True) if self.device.type != "cpu" else tensor

        parts = []
        for blocks, single in ((planned.chunks, False), (planned.singles, True)):
            if len(blocks):
                most = max(planned.lengths[s] for s in {int(s) for s in blocks[:, 0]})
                parts.append(StepPart(on_device(blocks), len(blocks), single, most))
        return TritonStep(
            self.program, self.store, self.launch, workspace, len(planned.ids), on_device(planned.ids),
            on_device(planned.positions), on_device(planned.wanted), on_device(planned.pages),
            on_device(planned.appended), parts, self.caches, self.reduce,
        )  # fmt: skip

    def _workspace(self, tokens: int, wanted: int) -> Workspace:
        """The workspace for the size class of these numbers of rows."""
        size = (_class(tokens), _class(wanted) if wanted else 0)
        if size not in self._workspaces:
            self._workspaces.clear()  # memory is planned for one: the two largest would not fit
            self._workspaces[size] = Workspace(self.program, *size, self.device)
        return self._workspaces[size]

    def close(self) -> None:
        self._workspaces.clear()
        self.caches = []
        close = getattr(self.launch, "close", None)
        if close is not None:
            close()


def engine_operators(program: TritonProgram, arch: int, processors: int) -> list[Operator]:
    """The operators of an engine, from which compilation takes the variants, too."""

    def attend(op: TritonOp) -> Operator:
        return Attend(op, program, arch, processors)

    return operators(program, arch, attend)


def _class(rows: int) -> int:
    return max(16, 1 << (rows - 1).bit_length())


def _alone(tensor: torch.Tensor) -> None:
    """The sum over a single card: does nothing."""
