"""Several cards run one model: the first one's process leads, each other card has a process of its own that follows.

Every process has its share of the weights and of the cache, runs the same steps on the same pages, and takes part in
the sums (`torch.distributed`: NCCL between cards, gloo in Triton's interpreter). Who leads says what comes next over a
pipe; what follows from it, such as what is recorded, is decided alike everywhere. A process that is lost takes the
model with it: steps raise, and nothing hangs for longer than `PATIENCE`.
"""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from transom.contract import Device, OutOfPages
from transom.errors import EngineError
from transom_cuda_triton.engine import Result, TritonEngine
from transom_cuda_triton.routes import RoutedStep
from transom_cuda_triton.sharding import sparsity_of

Array = np.ndarray[Any, np.dtype[Any]]
PATIENCE = 60.0
"""Seconds that a process waits for the others in a sum, or for an answer."""
BEGINNING = 600.0
"""Seconds that a process has to bring its weights to its card."""
LOST = "Load the model again"


@dataclass(frozen=True)
class Seat:
    """What a process needs to know to open its share."""

    rank: int
    ranks: int
    files: Mapping[str, Path]
    device: Device
    """Its own."""
    memory: int
    """Bytes that each card has at least: what follows from it has to be alike everywhere."""
    context: int
    meeting: str
    """A file in which the processes find each other."""


Opening = Callable[[Seat, Callable[[torch.Tensor], None]], tuple[TritonEngine, int]]
"""Opens a share: the engine, and pages that its card has room for. Given what puts sums in place of tensors."""


class Sums:
    """Sums over the tensors of all processes."""

    def __init__(self, seat: Seat, *, cuda: bool) -> None:
        distributed: Any = dist  # what is used of it has no types
        store = distributed.FileStore(seat.meeting, seat.ranks)
        patience = timedelta(seconds=PATIENCE)
        if cuda:
            options = distributed.ProcessGroupNCCL.Options()
            options._timeout = patience
            self._group = distributed.ProcessGroupNCCL(store, seat.rank, seat.ranks, options)
        else:
            self._group = distributed.ProcessGroupGloo(store, seat.rank, seat.ranks, patience)

    def __call__(self, tensor: torch.Tensor) -> None:
        """Put the sum over all processes in place of a tensor."""
        whole = tensor.contiguous()  # a view of a buffer's columns is none
        self._group.allreduce([whole]).wait()
        if whole.data_ptr() != tensor.data_ptr():
            tensor.copy_(whole)


class Follower:
    """Another card's process, as the leader sees it."""

    def __init__(self, seat: Seat, opening: Opening) -> None:
        spawn = get_context("spawn")
        self.name = seat.device.id
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(
            target=follow, args=(theirs, seat, opening), name=f"transom-{seat.device.id}", daemon=True
        )
        self._process.start()
        theirs.close()

    def send(self, what: str, *arguments: Any) -> None:
        try:
            self._pipe.send((what, arguments))
        except (OSError, ValueError) as e:
            raise self._lost() from e

    def answer(self, patience: float = PATIENCE) -> Any:
        """What came of the last call.

        Raises:
            EngineError: it failed, its process is gone, or it does not answer.
            OutOfPages: its card has no memory left.
        """
        try:
            if not self._pipe.poll(patience):
                raise EngineError(f"{self.name} does not answer", LOST)
            outcome, value = self._pipe.recv()
        except (OSError, EOFError) as e:
            raise self._lost() from e
        if outcome == "done":
            return value
        raise OutOfPages(f"{self.name}: {value}") if outcome == "full" else EngineError(f"{self.name}: {value}", LOST)

    def _lost(self) -> EngineError:
        self._process.join(1)
        return EngineError(f"The process of {self.name} ended (exit status {self._process.exitcode})", LOST)

    def end(self, *, gently: bool) -> None:
        """Close the process: by word where it listens."""
        if gently:
            try:
                self._pipe.send(("close", ()))
            except (OSError, ValueError):
                gently = False
        if not gently:
            self._process.kill()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._pipe.close()


def follow(pipe: Connection, seat: Seat, opening: Opening) -> None:
    """The life of a process that follows: opens its share, and does what it is told until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the leader's to hear
    engine: TritonEngine | None = None
    try:
        engine, pages = opening(seat, Sums(seat, cuda=seat.device.kind == "cuda"))
        pipe.send(("done", pages))
        while True:
            what, arguments = pipe.recv()
            if what == "close":
                return
            pipe.send(_outcome(engine, what, arguments))
    except EOFError:
        return  # the leader is gone
    except Exception as e:  # noqa: BLE001  whatever it is, the leader has to say it
        pipe.send(("failed", _said(e)))
    finally:
        if engine is not None:
            engine.close()


def _outcome(engine: TritonEngine, what: str, arguments: tuple[Any, ...]) -> tuple[str, Any]:
    try:
        if what == "step":
            return "done", engine.step(*arguments).counts
        return "done", getattr(engine, what)(*arguments)
    except (OutOfPages, torch.OutOfMemoryError) as e:
        return "full", _said(e)
    except Exception as e:  # noqa: BLE001  as above
        return "failed", _said(e)


def _said(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{lines[0] or type(error).__name__}"


class Team:
    """The engine of the first card, with the others following.

    Args:
        seats: of all cards, the leader's first.
        opening: opens a share; must be importable by name, for the other processes.

    Raises:
        EngineError, DoesNotFit: a card cannot open its share.
    """

    page_tokens = TritonEngine.page_tokens

    def __init__(self, seats: Sequence[Seat], opening: Opening, kv_heads: Sequence[int]) -> None:
        self._kv_heads, self._ranks, self._meeting = kv_heads, len(seats), Path(seats[0].meeting).parent
        self._broken: EngineError | None = None
        self.followers = [Follower(seat, opening) for seat in seats[1:]]
        try:
            lead = seats[0]
            self._engine, pages = opening(lead, Sums(lead, cuda=lead.device.kind == "cuda"))
            self.room = min(pages, *(f.answer(BEGINNING) for f in self.followers))
            """Pages that every card has room for."""
        except BaseException:
            self._end(gently=False)
            raise
        self.program, self.routes, self.device = self._engine.program, self._engine.routes, self._engine.device
        self.context = self._engine.context

    def page_bytes(self) -> int:
        """Over all cards."""
        return self._ranks * self._engine.page_bytes()

    def bind_pages(self, pages: int) -> None:
        self._all("bind_pages", pages)

    def copy_page(self, source: int, target: int) -> None:
        self._all("copy_page", source, target)

    def drop_pages(self, pages: Sequence[int]) -> None:
        """They stay with the pool."""

    def warm_up(self) -> None:
        self._all("warm_up")

    def _all(self, what: str, *arguments: Any) -> None:
        self._together(what, [arguments] * self._ranks, lambda own: getattr(self._engine, what)(*own))

    def _together(self, what: str, arguments: Sequence[tuple[Any, ...]], own: Callable[[Any], Any]) -> list[Any]:
        """The same call on all cards: what came of it, the leader's first."""
        if self._broken is not None:
            raise self._broken
        try:
            for follower, theirs in zip(self.followers, arguments[1:], strict=True):
                follower.send(what, *theirs)
            mine = own(arguments[0])
            return [mine, *(follower.answer() for follower in self.followers)]
        except BaseException as e:
            # Some process may be within a sum that never ends: none of them is at a place that the others know.
            reason = e.cause if isinstance(e, EngineError) else _said(e)
            self._broken = EngineError(f"A step over {self._ranks} cards broke off: {reason}", LOST)
            self._end(gently=False)
            if isinstance(e, EngineError | OutOfPages | KeyboardInterrupt | SystemExit):
                raise
            raise self._broken from e

    def step(
        self,
        tokens: Sequence[Array],
        past: Sequence[int],
        pages: Sequence[Sequence[int]],
        rows: Sequence[int],
        routed: RoutedStep | None = None,
    ) -> Result:
        """As `TritonEngine.step`; keys are counted over all cards."""
        arguments = [(list(tokens), list(past), list(pages), list(rows), self._share(routed, r)) for r in self._seats()]
        results = self._together("step", arguments, lambda own: self._engine.step(*own))
        result: Result = results[0]
        if result.counts is None:
            return result
        parts = [[*of] for of in zip(result.counts, *results[1:], strict=True)]
        return replace(result, counts=[self._joined(part) for part in parts])

    def _seats(self) -> range:
        return range(self._ranks)

    def _share(self, routed: RoutedStep | None, rank: int) -> RoutedStep | None:
        if routed is None:
            return None
        return replace(routed, policy=sparsity_of(routed.policy, self._kv_heads, self._ranks, rank))

    def _joined(self, counts: Sequence[Array]) -> Array:
        """The heads of all cards side by side: int32 [layers, 2, blocks, most kv_heads]."""
        first = counts[0]
        whole = np.zeros((*first.shape[:3], max(self._kv_heads)), first.dtype)
        for i, heads in enumerate(self._kv_heads):
            own = heads // self._ranks
            for rank, of in enumerate(counts):
                whole[i, :, :, rank * own : (rank + 1) * own] = of[i, :, : of.shape[2], :own]
        return whole

    def close(self) -> None:
        self._end(gently=self._broken is None)

    def _end(self, *, gently: bool) -> None:
        for follower in self.followers:
            follower.end(gently=gently)
        self.followers = []
        engine = getattr(self, "_engine", None)
        if engine is not None:
            engine.close()
        shutil.rmtree(self._meeting, ignore_errors=True)


def meeting_place() -> str:
    """The name of a file that is not there yet, in a folder of its own."""
    return str(Path(tempfile.mkdtemp(prefix="transom-team-")) / "store")
