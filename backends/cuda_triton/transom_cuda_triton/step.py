"""One step on the device: its inputs, query blocks and buffers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from transom.programs.written import View
from transom.sessions.steps import BLOCK, CHUNK
from transom_cuda_triton.cache import LayerPages
from transom_cuda_triton.program import TritonProgram
from transom_cuda_triton.store import TORCH, Store
from transom_cuda_triton.variants import Launcher

if TYPE_CHECKING:
    from transom_cuda_triton.routes import RoutingStep

ALIGNED = 64
"""Rows of a buffer are padded to a multiple of this many columns."""


class Workspace:
    """Buffers of a program for a number of rows."""

    def __init__(self, program: TritonProgram, tokens: int, wanted: int, device: torch.device) -> None:
        self.tokens, self.wanted = tokens, wanted
        late = {op.dst.buffer for op in program.ops if op.late}
        early = {v.buffer for op in program.ops if not op.late for v in (op.dst, op.a, op.b, op.c)}
        self.buffers: list[torch.Tensor] = []
        for i, width in enumerate(program.buffers):
            rows = max(tokens if i in early else 0, wanted if i in late else 0, 1)
            number = torch.float32 if i == program.output else TORCH[program.number]
            padded = -(-width // ALIGNED) * ALIGNED
            self.buffers.append(torch.zeros((rows, padded), dtype=number, device=device))

    @staticmethod
    def nbytes(program: TritonProgram, tokens: int, wanted: int) -> int:
        """Maximum size in bytes."""
        size = TORCH[program.number].itemsize
        wide = -(-program.buffers[program.output] // ALIGNED) * ALIGNED * 4 * wanted
        others = sum(-(-w // ALIGNED) * ALIGNED for i, w in enumerate(program.buffers) if i != program.output)
        return wide + others * size * max(tokens, wanted)


@dataclass
class StepPart:
    """Query blocks of a step for one attention kernel: those of prompts, or single queries."""

    blocks: torch.Tensor
    """BLOCKS, int32 [count, 4]."""
    count: int
    single: bool
    most_keys: int
    """Keys of the longest sequence in it, including new ones."""


@dataclass
class TritonStep:
    """The inputs of all operators in a step."""

    program: TritonProgram
    store: Store
    launch: Launcher
    workspace: Workspace
    tokens: int
    """Rows of new tokens."""
    ids: torch.Tensor
    """int64 [tokens]."""
    positions: torch.Tensor
    """int32 [tokens]."""
    wanted: torch.Tensor
    """int64: rows that need logits."""
    pages: torch.Tensor
    """PAGES, int32 [sequences, most_pages]."""
    appended: torch.Tensor
    """BLOCKS of new tokens, grouped by the page that they are written to, int32 [count, 4]."""
    parts: list[StepPart]
    caches: Sequence[LayerPages]
    reduce: Callable[[torch.Tensor], None]
    """Replaces a tensor with its sum over all cards."""
    routing: RoutingStep | None = None
    """The routing of sparse attention; None: attention is dense."""

    def zeros(self, count: int) -> torch.Tensor:
        """At least `count` int32 zeros, read-only."""
        if self._zeros is None or len(self._zeros) < count:
            self._zeros = torch.zeros(max(count, 1024), dtype=torch.int32, device=self.ids.device)
        return self._zeros

    _zeros: torch.Tensor | None = None

    def view(self, view: View, width: int, late: bool) -> torch.Tensor:
        """Rows of a buffer, [rows, width]."""
        rows = len(self.wanted) if late else self.tokens
        return self.workspace.buffers[view.buffer][:rows, view.offset : view.offset + width]


@dataclass(frozen=True)
class Planned:
    """A step as planned on the host, before anything is on the device. It follows from lengths alone."""

    ids: np.ndarray[Any, Any]
    positions: np.ndarray[Any, Any]
    wanted: np.ndarray[Any, Any]
    pages: np.ndarray[Any, Any]
    appended: np.ndarray[Any, Any]
    chunks: np.ndarray[Any, Any]
    """BLOCKS of queries that select keys together."""
    singles: np.ndarray[Any, Any]
    """BLOCKS of single queries."""
    lengths: tuple[int, ...]
    """Tokens of each sequence, including new ones."""
    counts: tuple[int, ...]
    """New tokens of each sequence."""


def plan(
    tokens: Sequence[np.ndarray[Any, Any]],
    past: Sequence[int],
    pages: Sequence[Sequence[int]],
    wanted: Sequence[int],
    spare: int,
) -> Planned:
    """Plan a step.

    Args:
        tokens: new token ids of each sequence, int64 [new].
        past: cached tokens of each sequence.
        pages: pages of each sequence, including those for the new tokens.
        wanted: indices of the tokens that need logits, among the new tokens of all sequences.
        spare: a page of no sequence, which fills unused entries of the page table.
    """
    counts = tuple(len(t) for t in tokens)
    lengths = tuple(p + n for p, n in zip(past, counts, strict=True))
    most = max(len(p) for p in pages)
    table = np.full((len(pages), most), spare, np.int32)
    for places, own in zip(table, pages, strict=True):
        places[: len(own)] = own
    appended: list[tuple[int, int, int, int]] = []
    chunks: list[tuple[int, int, int, int]] = []
    singles: list[tuple[int, int, int, int]] = []
    row = 0
    for s, begin in enumerate(past):
        count, end = counts[s], lengths[s]
        at, first = begin, len(appended)
        while at < end:
            size = min(at // BLOCK * BLOCK + BLOCK, end) - at
            appended.append((s, row + at - begin, at, size))
            at += size
        if count >= CHUNK:
            chunks += appended[first:]
        else:
            singles += [(s, row + i, begin + i, 1) for i in range(count)]
        row += count

    def blocks(found: list[tuple[int, int, int, int]]) -> np.ndarray[Any, Any]:
        return np.array(found, np.int32).reshape(-1, 4)

    positions = [p + np.arange(n, dtype=np.int32) for p, n in zip(past, counts, strict=True)]
    return Planned(
        np.concatenate(tokens).astype(np.int64), np.concatenate(positions), np.asarray(wanted, np.int64), table,
        blocks(appended), blocks(chunks), blocks(singles), lengths, counts,
    )  # fmt: skip
