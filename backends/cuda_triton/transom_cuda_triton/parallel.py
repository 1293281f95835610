"""Runs one model on several cards: the first card's process leads, and each other card has a process that follows.

Every process has its share of weights and cache, runs the same steps on the same pages, and takes part in the sums
(`torch.distributed`: NCCL between cards, gloo in Triton's interpreter). The leader sends each call over a pipe. All
processes derive the rest, such as what to record, in the same way. If a process is lost, so is the model: steps then
raise, and nothing blocks for longer than `PATIENCE`.
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
"""Seconds to wait for other processes in a sum, or for an answer."""
BEGINNING = 600.0
"""Seconds that a process may take to load its weights onto its card."""
REASON = 5.0
"""Seconds in which a process that failed says why."""
LOST = "Load the model again"


@dataclass(frozen=True)
class Seat:
    """The settings with which a process opens its share."""

    rank: int
    ranks: int
    files: Mapping[str, Path]
    device: Device
    """The process's own card."""
    memory: int
    """Memory of the smallest card, in bytes: all processes must derive the same sizes."""
    context: int
    meeting: str
    """A file by which the processes find each other."""


Opening = Callable[[Seat, Callable[[torch.Tensor], None]], tuple[TritonEngine, int]]
"""Opens a share, given a function that sums tensors in place. Returns the engine and the pages that fit its card."""


class Sums:
    """Sums tensors over all processes."""

    def __init__(self, seat: Seat, *, cuda: bool) -> None:
        distributed: Any = dist  # the parts used here are untyped
        store = distributed.FileStore(seat.meeting, seat.ranks)
        patience = timedelta(seconds=PATIENCE)
        if cuda:
            options = distributed.ProcessGroupNCCL.Options()
            options._timeout = patience
            self._group = distributed.ProcessGroupNCCL(store, seat.rank, seat.ranks, options)
        else:
            self._group = distributed.ProcessGroupGloo(store, seat.rank, seat.ranks, patience)

    def __call__(self, tensor: torch.Tensor) -> None:
        """Replace a tensor with its sum over all processes."""
        whole = tensor.contiguous()  # a view of a buffer's columns is not contiguous
        self._group.allreduce([whole]).wait()
        if whole.data_ptr() != tensor.data_ptr():
            tensor.copy_(whole)


class Follower:
    """The leader's handle on another card's process."""

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
        """The result of the last call.

        Raises:
            EngineError: the call failed, or the process ended or does not answer.
            OutOfPages: the card has no memory left.
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
        """End the process: `gently` by a message, otherwise by a signal."""
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
    """Main function of a following process: opens its share, and runs the leader's calls until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the leader handles Ctrl-C
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
        return  # the leader has ended
    except Exception as e:  # noqa: BLE001  the leader reports any error
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
    """The engine of the first card, which the other cards follow.

    Args:
        seats: settings of all cards, the leader's first.
        opening: opens a share; other processes must be able to import it by name.

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
            """Pages that fit on every card."""
        except RuntimeError as e:  # of torch: the others cannot be reached, most often because one of them has failed
            reason = self._reason_of_a_follower()
            self._end(gently=False)
            raise reason or EngineError(f"The cards cannot work together: {_said(e)}", LOST) from e
        except BaseException:
            self._end(gently=False)
            raise
        self.program, self.routes, self.device = self._engine.program, self._engine.routes, self._engine.device
        self.context = self._engine.context

    def _reason_of_a_follower(self) -> EngineError | None:
        """The error of the card that failed first: the others only miss it."""
        reasons = []
        for follower in self.followers:
            try:
                follower.answer(REASON)
            except EngineError as e:
                reasons.append(e)
            except OutOfPages as e:
                reasons.append(EngineError(_said(e), LOST))
        return min(reasons, key=lambda e: "onnect" in e.cause or "does not answer" in e.cause, default=None)

    def page_bytes(self) -> int:
        """Bytes of one page, summed over all cards."""
        return self._ranks * self._engine.page_bytes()

    def bind_pages(self, pages: int) -> None:
        self._all("bind_pages", pages)

    def copy_page(self, source: int, target: int) -> None:
        self._all("copy_page", source, target)

    def drop_pages(self, pages: Sequence[int]) -> None:
        """Does nothing: the memory stays with the pool."""

    def warm_up(self) -> None:
        self._all("warm_up")

    def _all(self, what: str, *arguments: Any) -> None:
        self._together(what, [arguments] * self._ranks, lambda own: getattr(self._engine, what)(*own))

    def _together(self, what: str, arguments: Sequence[tuple[Any, ...]], own: Callable[[Any], Any]) -> list[Any]:
        """Make the same call on all cards; the results, the leader's first."""
        if self._broken is not None:
            raise self._broken
        try:
            for follower, theirs in zip(self.followers, arguments[1:], strict=True):
                follower.send(what, *theirs)
            mine = own(arguments[0])
            return [mine, *(follower.answer() for follower in self.followers)]
        except BaseException as e:
            # Some process may be in a sum that never ends, and the state of the others is unknown.
            reason = e.cause if isinstance(e, EngineError) else _said(e)
            self._broken = EngineError(f"A step over {self._ranks} cards failed: {reason}", LOST)
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
        """As `TritonEngine.step`, with key counts of all cards."""
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
        """Concatenate the heads of all cards: int32 [layers, 2, blocks, largest kv_heads]."""
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
    """The path of a file that does not exist yet, in a new folder."""
    return str(Path(tempfile.mkdtemp(prefix="transom-team-")) / "store")
