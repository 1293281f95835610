"""The reference's answer, computed by a process beside the one that compiles: the first load of a model waits for both,
and each is the interpreter's work to a large part, so that threads would only take turns."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.contract import Cancelled, Progress
from transom.hardware.cpu import this_host
from transom.preparation.child import run_in_child
from transom.preparation.jobs import ENTRY, GOLDEN, Job

if TYPE_CHECKING:
    from transom.artifacts import Cache

ROOM = 8
"""Times the size of the model's files that must be free. The reference unpacks one weight at a time, to float32."""
HEARTBEAT = 0.25
"""Seconds between two reports."""


def worth_it(job: Job, cache: Cache, free: int | None) -> bool:
    """Whether the reference's answer is wanted and not known, and there is a processor and memory for it.

    Args:
        free: bytes of the host's memory, whatever the device; None where nobody knows.
    """
    wanted = job.verify or not job.runs  # what is compiled for elsewhere carries it there
    if not wanted or job.graph or len(this_host().affinity) < 2:
        return False
    # Only the host comes here. Importing these would keep the child from starting the other process first of all.
    from transom.preparation import cached_source
    from transom.preparation.reference_outputs import recall

    source = cached_source.find(cache, job.content, job.source_context)
    if source is not None and recall(cache, source) is not None:
        return False
    path = Path(job.model)
    try:
        files = [path] if path.is_file() else [p for p in path.iterdir() if p.is_file()]
        size = sum(p.stat().st_size for p in files)
    except OSError:
        return False
    return free is not None and free > ROOM * size


@contextmanager
def reference_beside(payload: Mapping[str, Any]) -> Iterator[Future[Any]]:
    """While the block runs, a child process computes the golden logits for the job of this payload and keeps them in
    the cache. The block's end stops it."""
    stop = threading.Event()

    def go_on(stage: str, share: float | None) -> None:
        if stop.is_set():
            raise Cancelled

    with ThreadPoolExecutor(1, thread_name_prefix="transom-reference") as threads:
        try:
            yield threads.submit(run_in_child, ENTRY, {**payload, "work": GOLDEN}, progress=go_on)
        finally:
            stop.set()


def wait_for(reference: Future[Any], progress: Progress) -> None:
    """Returns when the process has ended, whatever it made."""
    while not reference.done():
        wait([reference], timeout=HEARTBEAT)
        progress("reference", None)
