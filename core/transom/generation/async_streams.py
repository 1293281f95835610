"""Generations for programs that use asyncio: a stream that is read in a thread of its own.

Imported when `Model.agenerate`, `astream`, `achat` or `astream_chat` is first called.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import TypeVar

from transom.generation.results import Generation, StreamPiece
from transom.generation.streams import Stream

T = TypeVar("T")


class AsyncStream:
    """A generation as an asynchronous iterator: `async for piece in stream`, or `await stream.result()`.

    It begins with the first of these, in a thread, so the event loop is not blocked. Cancelling the task that awaits
    it, leaving an `async with` block, or dropping it cancels the generation after its current step. Only one task may
    iterate.

    Args:
        start: starts the generation; called in the thread.
    """

    def __init__(self, start: Callable[[], Stream]) -> None:
        self._reading = _Reading(start)
        self._begun = False

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> StreamPiece:
        reading = self._begin()
        if reading.ended.is_set() and reading.pieces.empty():
            raise StopAsyncIteration
        piece = await self._or_cancel(reading.pieces.get())
        if piece is not None:
            return piece
        if reading.error is not None:
            raise reading.error
        raise StopAsyncIteration

    async def result(self) -> Generation:
        """The whole result; first generates the rest. Unread pieces remain readable.

        Raises:
            TransomError: as for the method that made the stream, and errors of the computation.
        """
        reading = self._begin()
        await self._or_cancel(reading.ended.wait())
        if reading.error is not None:
            raise reading.error
        assert reading.result is not None
        return reading.result

    def cancel(self) -> None:
        """Stop with the current step. The iteration ends, with `finish_reason` "cancelled". Any thread may call
        this."""
        self._reading.cancel()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def __del__(self) -> None:
        self._reading.cancel()

    def _begin(self) -> _Reading:
        if not self._begun:
            self._begun = True
            run = self._reading.run
            threading.Thread(target=run, args=(asyncio.get_running_loop(),), name="transom-async", daemon=True).start()
        return self._reading

    async def _or_cancel(self, waiting: Awaitable[T]) -> T:
        try:
            return await waiting
        except asyncio.CancelledError:
            self.cancel()
            raise


class _Reading:
    """The thread's side. It does not refer to the `AsyncStream`, so that one that is dropped is collected."""

    def __init__(self, start: Callable[[], Stream]) -> None:
        self.pieces: asyncio.Queue[StreamPiece | None] = asyncio.Queue()
        """In order; None at the end."""
        self.ended = asyncio.Event()
        self.error: Exception | None = None
        self.result: Generation | None = None
        self._start = start
        self._stream: Stream | None = None
        self._cancelled = False
        self._lock = threading.Lock()

    def cancel(self) -> None:
        with self._lock:
            self._cancelled = True
            stream = self._stream
        if stream is not None:
            stream.cancel()

    def run(self, loop: asyncio.AbstractEventLoop) -> None:
        """Generate everything, and hand it to the event loop."""
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
            try:
                stream = self._start()
                with self._lock:
                    self._stream = stream
                    cancelled = self._cancelled
                with stream:
                    if cancelled:
                        stream.cancel()
                    for piece in stream:
                        loop.call_soon_threadsafe(self.pieces.put_nowait, piece)
                    self.result = stream.result
            except Exception as error:  # noqa: BLE001  raised again where the result is awaited
                self.error = error
            loop.call_soon_threadsafe(self.pieces.put_nowait, None)
            loop.call_soon_threadsafe(self.ended.set)
