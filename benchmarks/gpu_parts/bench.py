"""What every part receives: the card, the clock, the timer, the sizes, and the destination of results."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parts.running import PartContext

from gpu_parts.card import GpuCard
from gpu_parts.timing import FakeTimer, Timer


@dataclass(frozen=True)
class GpuSizes:
    """Sizes of what is measured."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    hidden: int = 4096
    inner: int = 14336
    layers: int = 32
    vocabulary: int = 128256
    block: int = 32
    """Columns that share a scale."""
    lengths: tuple[int, ...] = (4096, 16384, 65536, 131072)
    """Lengths for attention, in tokens."""
    densities: tuple[float, ...] = (0.1, 0.2)
    near: int = 512
    """Keys before a query block that it always reads, in the lists that attention is measured with."""
    end_to_end: int = 16384
    """Prompt length of the whole model, in tokens."""
    chunk: int = 1024
    """Tokens of a step of a prompt."""
    decodes: int = 64
    """Tokens that are decoded for one figure; columns are chosen once in this many."""
    batch: int = 8
    """Sequences that decode together, in addition to one alone."""
    product_rows: tuple[int, ...] = (1, 16, 1024)
    peak: int = 8192
    """Rows and columns of the product that is taken as the card's peak."""
    copied: int = 1 << 30
    """Bytes that are copied to measure the memory."""
    scratch: int = 512 << 20
    """Limit on the bytes of weights or cache that successive calls cycle through, so that none hits the L2 cache."""

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads


QUICK: dict[str, Any] = {"lengths": (4096, 16384), "densities": (0.2,), "product_rows": (1, 1024)}
TOY = GpuSizes(
    heads=2, kv_heads=1, head_dim=16, hidden=64, inner=64, layers=1, vocabulary=64, lengths=(256, 384),
    densities=(0.6,), near=128, end_to_end=144, chunk=96, decodes=1, batch=2, product_rows=(1, 3), peak=64,
    copied=1 << 16, scratch=1 << 12,
)  # fmt: skip


@dataclass
class GpuBench(PartContext[GpuCard]):
    """One run."""

    timer: Timer | FakeTimer
    sizes: GpuSizes
    quick: bool
    folder: Path = field(default_factory=lambda: Path(tempfile.gettempdir()))
    """Folder for artifacts."""
