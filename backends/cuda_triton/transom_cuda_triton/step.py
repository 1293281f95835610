"""One step on the device: what is computed, on which rows, and where its numbers lie."""

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
"""Columns that rows of a buffer are padded to."""


class Workspace:
    """Buffers of a program for so many rows."""

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
        """Bytes that it takes, at most."""
        size = TORCH[program.number].itemsize
        wide = -(-program.buffers[program.output] // ALIGNED) * ALIGNED * 4 * wanted
        others = sum(-(-w // ALIGNED) * ALIGNED for i, w in enumerate(program.buffers) if i != program.output)
        return wide + others * size * max(tokens, wanted)


@dataclass
class StepPart:
    """Query blocks of a step that one attention kernel takes: those of prompts, or single queries."""

    blocks: torch.Tensor
    """BLOCKS, int32 [count, 4]."""
    count: int
    single: bool
    most_keys: int
    """Of the longest sequence in it, the new ones included."""


@dataclass
class TritonStep:
    """What operators are launched with."""

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
    """int64: the rows whose logits are wanted."""
    pages: torch.Tensor
    """PAGES, int32 [sequences, most_pages]."""
    appended: torch.Tensor
    """BLOCKS of new tokens by the page that they go into, int32 [count, 4]."""
    parts: list[StepPart]
    caches: Sequence[LayerPages]
    reduce: Callable[[torch.Tensor], None]
    """Puts the sum over all cards in place of a tensor."""
    routing: RoutingStep | None = None
    """What the sequences read sparsely by; None: everything."""

    def zeros(self, count: int) -> torch.Tensor:
        """int32 zeros, so many at least; not to be written to."""
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
    """A step as the host lays it out, before anything is on the device. All of it follows from lengths alone."""

    ids: np.ndarray[Any, Any]
    positions: np.ndarray[Any, Any]
    wanted: np.ndarray[Any, Any]
    pages: np.ndarray[Any, Any]
    appended: np.ndarray[Any, Any]
    chunks: np.ndarray[Any, Any]
    """BLOCKS of queries that choose together."""
    singles: np.ndarray[Any, Any]
    """BLOCKS of queries that choose alone."""
    lengths: tuple[int, ...]
    """Tokens of each sequence, the new ones included."""
    counts: tuple[int, ...]
    """New tokens of each sequence."""


def plan(
    tokens: Sequence[np.ndarray[Any, Any]],
    past: Sequence[int],
    pages: Sequence[Sequence[int]],
    wanted: Sequence[int],
    spare: int,
) -> Planned:
    """Lay a step out.

    Args:
        tokens: int64 [new] of each sequence.
        past: tokens that each has cached before.
        pages: of each, those that the new tokens go to included.
        wanted: rows whose logits are wanted, counted over all sequences.
        spare: a page that is nobody's, for places of the table that have none.
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
