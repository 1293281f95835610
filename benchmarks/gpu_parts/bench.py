"""What every part is handed: the card, the clock, the timer, the sizes, and where results go."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from gpu_parts.card import Card
from gpu_parts.report import Cell, Document, Part, Table, line
from gpu_parts.timing import Clock, FakeTimer, Timer


@dataclass(frozen=True)
class Sizes:
    """Of what is measured."""

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
    """Tokens, of attention."""
    densities: tuple[float, ...] = (0.1, 0.2)
    near: int = 512
    """Keys before a query block that it reads all of, in the lists that attention is measured with."""
    end_to_end: int = 16384
    """Tokens, of the whole model."""
    chunk: int = 1024
    """Tokens of a step of a prompt."""
    decodes: int = 64
    """Tokens that are decoded for one figure: columns are chosen anew once in so many."""
    batch: int = 8
    """Sequences that decode together, beside one alone."""
    product_rows: tuple[int, ...] = (1, 16, 1024)
    peak: int = 8192
    """Rows and columns of the product that is taken as the card's peak."""
    copied: int = 1 << 30
    """Bytes that are copied to measure the memory."""
    scratch: int = 512 << 20
    """Bytes of weights or cache that calls in turn read, at most, so that none finds them in the cache of level 2."""

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads


QUICK = {"lengths": (4096, 16384), "densities": (0.2,), "product_rows": (1, 1024)}
TOY = Sizes(
    heads=2, kv_heads=1, head_dim=16, hidden=64, inner=64, layers=1, vocabulary=64, lengths=(256, 384),
    densities=(0.6,), near=128, end_to_end=144, chunk=96, decodes=1, batch=2, product_rows=(1, 3), peak=64,
    copied=1 << 16, scratch=1 << 12,
)  # fmt: skip


@dataclass
class Bench:
    """One run."""

    card: Card
    clock: Clock
    timer: Timer | FakeTimer
    sizes: Sizes
    quick: bool
    document: Document
    seed: int
    folder: Path = field(default_factory=lambda: Path(tempfile.gettempdir()))
    """For artifacts."""

    @property
    def dry(self) -> bool:
        return self.card.dry

    @property
    def part(self) -> Part:
        return self.document.parts[-1]

    def say(self, text: str) -> None:
        print(f"[{self.clock.now:5.0f} s] {text}", flush=True)

    def table(self, title: str, about: str) -> Table:
        self.say(title)
        self.part.tables.append(Table(title, about))
        return self.part.tables[-1]

    def row(self, table: Table, **cells: Cell) -> None:
        """Add a row and show it, and note the card's clocks. Underscores of names are blanks."""
        found = {name.replace("_", " "): value for name, value in cells.items()}
        table.rows.append(found)
        if not self.dry:
            self.part.clocks.append(self.card.state())
        self.say(line(found))

    def check(
        self, name: str, outcome: str, reason: str = "", error: float | None = None, *, loud: bool = True
    ) -> None:
        """passed, failed or left out; said aloud unless it passed."""
        self.document.checks.append({"name": name, "outcome": outcome, "reason": reason, "error": error})
        if loud and outcome != "passed":
            self.say(f"{outcome.upper()}  {name}: {reason}")

    def bound(self, name: str) -> float | None:
        return self.document.bounds.get(name)

    def share(self, amount: float, seconds: float | None, bound: str) -> float | None:
        """What share of a bound is reached, by an amount of it in so many seconds."""
        most = self.bound(bound)
        return None if seconds is None or not most else amount / seconds / most


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
