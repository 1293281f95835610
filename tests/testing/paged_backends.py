"""Backends with a paged cache and with static shapes: what the kit asks of a pool, a right one and some wrong ones.

The pool only keeps accounts; the numbers come from the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from changed_reference import Changed

from transom.contract import Artifact, Device, Limits, Offer, Options, OutOfPages, Refusal, Session, State, Work
from transom.graph import Graph
from transom.reference.executor import Executor
from transom.sessions import PackedSession, PackedState

PAGE = 8


class Pool:
    """Reference counts of pages."""

    def __init__(self, pages: int) -> None:
        self.total = pages
        self.counts: dict[int, int] = {}

    @property
    def free(self) -> int:
        return self.total - len(self.counts)

    def take(self, pages: int) -> list[int]:
        if pages > self.free:
            raise OutOfPages(f"{pages} pages needed, {self.free} free")
        unused = [p for p in range(self.total) if p not in self.counts][:pages]
        self.counts |= dict.fromkeys(unused, 1)
        return unused

    def give(self, pages: Sequence[int]) -> None:
        for page in pages:
            self.counts[page] -= 1
            if not self.counts[page]:
                del self.counts[page]


class PagedState:
    """A packed state and the pages it would occupy; a shared last page is copied before it is written to."""

    def __init__(self, inner: PackedState, pool: Pool, pages: list[int]) -> None:
        self.inner, self.pool, self.pages, self.leaks = inner, pool, pages, False

    length = property(lambda self: self.inner.length)
    nbytes = property(lambda self: self.inner.nbytes)

    def needed(self, tokens: int) -> int:
        """Pages that a step takes: new ones, and a copy of a shared last one."""
        grown = -(-(self.length + tokens) // PAGE) - len(self.pages)
        copied = self.length % PAGE != 0 and self.pool.counts[self.pages[-1]] > 1
        return grown + copied

    def grow(self, tokens: int) -> None:
        if self.length % PAGE and self.pool.counts[self.pages[-1]] > 1:
            self.pool.give([self.pages.pop()])
        self.pages += self.pool.take(-(-(self.length + tokens) // PAGE) - len(self.pages))

    def fork(self, length: int) -> PagedState:
        inner = self.inner.fork(length)
        pages = self.pages[: -(-length // PAGE)]
        for page in pages:
            self.pool.counts[page] += 1
        return PagedState(inner, self.pool, list(pages))

    def truncate(self, length: int) -> None:
        self.inner.truncate(length)
        keep = -(-length // PAGE)
        self.pool.give(self.pages[keep:])
        del self.pages[keep:]

    def free(self) -> None:
        self.inner.free()
        if not self.leaks:
            self.pool.give(self.pages)
        self.pages = []


class PagedSession(PackedSession):
    pool_pages = 40
    leaks = False
    steps_before_it_asks = False

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.pool = Pool(self.pool_pages)

    def pages(self) -> tuple[int, int]:
        return self.pool.total, self.pool.free

    def new_state(self) -> State:  # type: ignore[override]
        state = PagedState(super().new_state(), self.pool, [])
        state.leaks = self.leaks
        return state

    def step(self, work: Sequence[Work]) -> list[Any]:
        states: list[Any] = [w.state for w in work]
        inner = [replace(w, state=w.state.inner) for w in work]  # type: ignore[attr-defined]
        lengths = [s.length for s in states]
        needed = sum(s.needed(len(w.tokens)) for s, w in zip(states, work, strict=True) if s.inner._cache is not None)
        if self.steps_before_it_asks:
            results = list(super().step(inner))
        if needed > self.pool.free:
            raise OutOfPages(f"{needed} pages needed, {self.pool.free} free")
        if not self.steps_before_it_asks:
            results = list(super().step(inner))
        for state, w, length in zip(states, work, lengths, strict=True):
            after, state.inner._length = state.inner._length, length
            state.grow(len(w.tokens))
            state.inner._length = after
        return results


class Paged(Changed):
    """Right: 40 pages of 8 tokens."""

    name = "paged"
    session = PagedSession
    limits = Limits(8, 512, 0, page_tokens=PAGE)


class LeaksPages(Paged):
    caught_by: ClassVar[tuple[str, ...]] = ("state.pages",)

    class session(PagedSession):
        leaks = True


class WritesBeforeItAsksForPages(Paged):
    caught_by: ClassVar[tuple[str, ...]] = ("limits.out_of_pages",)

    class session(PagedSession):
        steps_before_it_asks = True


class SaysItHasNoPages(Paged):
    caught_by: ClassVar[tuple[str, ...]] = ("session.limits",)

    class session(PagedSession):
        def pages(self) -> tuple[int, int]:
            return 0, 0


class HugePool(Paged):
    """Right, but too large to be filled by a test."""

    class session(PagedSession):
        pool_pages = 1_000_000

        def pages(self) -> tuple[int, int]:
            return self.pool.total, self.pool.total - len(self.pool.counts)


class OneSequence(Changed):
    """Right: runs one sequence at a time, as many phones' runtimes do."""

    name = "one_sequence"
    limits = Limits(1, 4096, 0, 0)


class StaticShapes(Changed):
    """Right: takes chunks of 1, 4 or 16 tokens only, as NPUs do."""

    name = "static_shapes"
    limits = Limits(1, 16, 0, 0, token_classes=(1, 4, 16))


class ExportOnly(Changed):
    """Right: compiles for a phone, and loads nothing here."""

    name = "export_only"

    def probe(self, devices: Sequence[Device]) -> Sequence[Offer | Refusal]:
        return [
            Offer(d.id, "native", "compiles for Hexagon", runs_here=False)
            if d.kind == "remote"
            else Refusal(d.id, "wrong_device", "compiles for phones only")
            for d in devices
        ]

    def load(self, artifact: Artifact, device: Device, options: Options, scratch: Path) -> Session:
        raise AssertionError("nothing is loaded where the offer says that nothing runs")


class HalfPrecision(Changed):
    """Right, in float16: weights and activations of every node are rounded."""

    name = "half_precision"

    def load(self, artifact: Artifact, device: Device, options: Options, scratch: Path) -> Session:
        path = artifact.files["graph.onnx"]
        assert isinstance(path, Path)
        executor = Rounding(Graph.open(path))
        decoder = executor.graph.decoder
        limits = replace(self.limits, context=decoder.context if decoder else 1)
        return PackedSession(executor.run, decoder, limits)


class Rounding(Executor):
    def _execute(self, node: Any, values: Any) -> None:
        import numpy as np

        super()._execute(node, values)
        for output in node.outputs:
            array = values.get(id(output))
            if (
                isinstance(array, np.ndarray)
                and array.dtype == np.float32
                and node.op_type not in ("Cos", "Sin", "Mul")
            ):
                values[id(output)] = array.astype(np.float16).astype(np.float32)
