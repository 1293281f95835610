"""Assigns a buffer of rows to each value of a program. A buffer is reused once no later operator reads its value."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transom.programs.written import View

if TYPE_CHECKING:
    from transom.programs.reading import Op, Value


@dataclass(frozen=True)
class Buffer:
    """Rows of `width` numbers."""

    width: int
    local: bool
    """Whether all its reads and writes lie between the same two barriers."""


class BufferAllocator:
    """Assigns each value a free buffer of the same width, or a new one.

    Args:
        ops: in execution order.
        logits: gets a buffer that is never reused.
        barriers: kinds of operators that read the rows of other tokens.
    """

    def __init__(self, ops: Sequence[Op], logits: Value, barriers: Collection[str] = ()) -> None:
        self.buffers: list[Buffer] = []
        self._at: dict[int, int] = {}
        self._free: dict[tuple[int, bool], list[int]] = {}
        self._last: dict[int, int] = {}
        self._local: dict[int, bool] = {}
        self._logits = logits.root()[0]
        self.output = self._new(self._logits.width, local=False)
        self._at[id(self._logits)] = self.output
        segment = 0
        segments: dict[int, set[int]] = {}
        for i, op in enumerate(ops):
            barrier = op.kind in barriers
            for value in (*op.reads(), op.dst):
                root = id(value.root()[0])
                self._last[root] = i
                segments.setdefault(root, set()).add(-1 if barrier else segment)
            segment += barrier
        self._local = {root: len(used) == 1 and -1 not in used for root, used in segments.items()}

    def _new(self, width: int, *, local: bool) -> int:
        self.buffers.append(Buffer(width, local))
        return len(self.buffers) - 1

    def place(self, value: Value) -> View:
        """The view in which the value is stored."""
        root, offset = value.root()
        if id(root) not in self._at:
            local = self._local[id(root)]
            free = self._free.get((root.width, local))
            self._at[id(root)] = free.pop() if free else self._new(root.width, local=local)
        return View(self._at[id(root)], offset)

    def done(self, index: int, op: Op) -> None:
        """Operator `index` has run: free the buffers of the values that no later operator reads."""
        for value in {id(v.root()[0]): v.root()[0] for v in (*op.reads(), op.dst)}.values():
            if self._last[id(value)] == index and value is not self._logits:
                self._free.setdefault((value.width, self._local[id(value)]), []).append(self._at[id(value)])
