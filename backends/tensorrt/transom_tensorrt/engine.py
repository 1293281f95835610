"""Executes steps of many sequences as runs of a network over slots.

A sequence with several new tokens runs alone. Sequences with one new token run together if their slots are adjacent;
so do, token by token, sequences with fewer tokens than a prefill takes. The cost of a run is reading its weights and
caches. A run may therefore include slots that are not in the step, if reading their caches costs less than reading the
weights again. Such an idle slot gets a dummy token, written after its own tokens, where the next real token overwrites
it. A full slot has no such position, so no run of others includes it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from transom.errors import EngineError, option
from transom_tensorrt.executing import Array, NetworkExecutor, Way
from transom_tensorrt.network import Network, ShapeProfile


@dataclass(frozen=True)
class Run:
    """Adjacent slots that run together."""

    first: int
    count: int


def runs(wanted: Sequence[int], most: int, idle_bytes: Callable[[int], int | None], weight_bytes: int) -> list[Run]:
    """Group slots into runs of at most `most`.

    Args:
        wanted: slots, in ascending order.
        idle_bytes: bytes that a run reads for a slot that is not wanted; None: no run may include that slot.
        weight_bytes: bytes of weights that every run reads.
    """
    found: list[Run] = []
    for slot in wanted:
        if found and _bridged(found[-1], slot, most, idle_bytes, weight_bytes):
            found[-1] = Run(found[-1].first, slot - found[-1].first + 1)
        else:
            found.append(Run(slot, 1))
    return found


def _bridged(run: Run, slot: int, most: int, idle_bytes: Callable[[int], int | None], weight_bytes: int) -> bool:
    if slot - run.first >= most:
        return False
    total = 0
    for idle in range(run.first + run.count, slot):
        cost = idle_bytes(idle)
        if cost is None:
            return False
        total += cost
    return total <= weight_bytes


def pieces(tokens: int, rows: Sequence[int], profile: ShapeProfile) -> Iterator[tuple[int, int]]:
    """Cut the new tokens of one sequence into pieces (start, end) that fit a profile.

    Args:
        rows: tokens whose logits are wanted, in ascending order.
    """
    start, most_rows = 0, profile.rows[2]
    while start < tokens:
        end = min(tokens, start + profile.tokens[2])
        inside = [row for row in rows if start <= row < end]
        if len(inside) > most_rows:
            end = inside[most_rows]
        yield start, end
        start = end


@dataclass(frozen=True)
class _Part:
    """One sequence's share of a step."""

    slot: int
    tokens: Array
    past: int
    rows: tuple[int, ...]
    """Indices among its tokens."""
    at: int
    """Index of its first row among those of the step."""

    def one(self, index: int) -> _Part:
        """One of its tokens as a part of its own."""
        rows = (0,) if index in self.rows else ()
        before = sum(row < index for row in self.rows)
        return _Part(self.slot, self.tokens[index : index + 1], self.past + index, rows, self.at + before)


class SlotEngine:
    """A `transom.sessions.PagedEngine` whose page is a whole slot: every sequence holds one.

    It records how far each slot is filled, which may be further than the length of a truncated sequence.

    Args:
        slots: the result of `executor.allocate`.
    """

    def __init__(self, network: Network, executor: NetworkExecutor, slots: int) -> None:
        self.network, self.executor, self.slots = network, executor, slots
        self.page_tokens = network.context
        self._filled = [0] * slots

    # slots ------------------------------------------------------------------------------------------------------------
    def page_bytes(self) -> int:
        return self.network.slot_bytes

    def bind_pages(self, pages: int) -> None:
        """The slots are already allocated.

        Raises:
            ValueError: there are fewer slots than pages.
        """
        if pages > self.slots:
            raise ValueError(f"{pages} pages, but only {self.slots} slots")

    def copy_page(self, source: int, target: int) -> None:
        self._begin(target, self._filled[source])
        self.executor.copy_slot(source, target, self._filled[source])

    def drop_pages(self, pages: Sequence[int]) -> None:
        """Mark slots as free; their memory stays allocated."""
        for slot in pages:
            self._filled[slot] = 0

    def read(self, slot: int, positions: int) -> Mapping[str, Array]:
        """See `NetworkExecutor.read_slot`."""
        return self.executor.read_slot(slot, positions)

    def write(self, slot: int, positions: int, arrays: Mapping[str, Array]) -> None:
        """See `NetworkExecutor.write_slot`."""
        self._begin(slot, positions)
        self.executor.write_slot(slot, arrays)

    def _begin(self, slot: int, positions: int) -> None:
        """Prepare a slot for a sequence that fills `positions` at once.

        The rest is cleared: attention multiplies masked positions by zero, and zero times a NaN left there by another
        sequence is NaN.
        """
        self.executor.clear_slot(slot, positions)
        self._filled[slot] = positions

    # steps ------------------------------------------------------------------------------------------------------------
    def warm_up(self) -> None:
        self.executor.warm_up()

    def step(
        self, tokens: Sequence[Array], past: Sequence[int], pages: Sequence[Sequence[int]], rows: Sequence[int]
    ) -> Array:
        """See `transom.sessions.PagedEngine.step`; float32 [rows, vocabulary].

        Raises:
            EngineError: the network cannot be run, or its logits are not finite.
        """
        logits = np.empty((len(rows), self.network.vocabulary), np.float32)
        parts = _parts(tokens, past, pages, rows)
        least = max(2, self.network.prefill.tokens[0])
        few = sorted((p for p in parts if len(p.tokens) < least), key=lambda p: p.slot)
        try:
            for part in parts:
                if part.past == 0:
                    self._begin(part.slot, 0)
                if len(part.tokens) >= least:
                    self._prefill(part, logits)
            for i in range(max((len(p.tokens) for p in few), default=0)):
                self._decode([p.one(i) for p in few if i < len(p.tokens)], logits)
            if not np.isfinite(logits).all():
                raise EngineError(
                    "The last layer gave numbers that are not finite",
                    "The model's weights may be damaged, or its values may exceed float16's range: "
                    f"try {option('precision', 'bf16')}",
                )
        except BaseException:
            for part in parts:  # values that may not be finite must not stay after the tokens: see `_begin`
                with contextlib.suppress(EngineError):  # a card that cannot clear cannot run: the first error tells why
                    self.executor.clear_slot(part.slot, part.past)
            raise
        return logits

    def _prefill(self, part: _Part, logits: Array) -> None:
        for start, end in pieces(len(part.tokens), part.rows, self.network.prefill):
            if end - start < self.network.prefill.tokens[0]:
                for i in range(start, end):
                    self._decode([part.one(i)], logits)
                continue
            rows = [row - start for row in part.rows if start <= row < end]
            self._filled[part.slot] = part.past + end
            given = np.asarray(rows or [0], np.int64)  # no profile allows zero rows
            found = self._run("prefill", part.tokens[None, start:end], [part.past + start], given, part.slot)
            at = part.at + sum(row < start for row in part.rows)
            logits[at : at + len(rows)] = found[: len(rows)]

    def _decode(self, parts: Sequence[_Part], logits: Array) -> None:
        by_slot = {part.slot: part for part in parts}
        most = self.network.decode.batch[2]
        for run in runs(list(by_slot), most, self._idle_bytes, self.executor.weight_bytes):
            here = range(run.first, run.first + run.count)
            ids = np.zeros((run.count, 1), np.int64)
            past = []
            for i, slot in enumerate(here):
                if slot in by_slot:
                    ids[i] = by_slot[slot].tokens
                    past.append(by_slot[slot].past)
                    self._filled[slot] = by_slot[slot].past + 1
                else:
                    past.append(self._filled[slot])
            # All rows, even unwanted ones: fewer shapes mean fewer kernels and graphs.
            found = self._run("decode", ids, past, np.arange(run.count), run.first)
            for i, slot in enumerate(here):
                if slot in by_slot and by_slot[slot].rows:
                    logits[by_slot[slot].at] = found[i]

    def _run(self, way: Way, ids: Array, past: Sequence[int], rows: Array, first: int) -> Array:
        return self.executor.run(way, ids, np.asarray(past, np.int64), rows, first)

    def _idle_bytes(self, slot: int) -> int | None:
        filled, context = self._filled[slot], self.network.context
        return None if filled == context else self.network.slot_bytes * (filled + 1) // context

    def close(self) -> None:
        self.executor.close()


def _parts(
    tokens: Sequence[Array], past: Sequence[int], pages: Sequence[Sequence[int]], rows: Sequence[int]
) -> list[_Part]:
    """Split a step by sequence; `rows` are in ascending order."""
    starts = np.cumsum([0, *map(len, tokens)])
    cuts = np.searchsorted(np.asarray(rows, np.int64), starts)
    found = []
    for i, (new, old, (slot,)) in enumerate(zip(tokens, past, pages, strict=True)):
        own = tuple(int(row - starts[i]) for row in rows[cuts[i] : cuts[i + 1]])
        found.append(_Part(slot, new, old, own, int(cuts[i])))
    return found
