"""Computes the reference outputs in a process of its own, in parallel with the one that compiles.

The first load of a model waits for both. Both are largely Python code, so threads would wait for the interpreter lock.
"""

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
from transom.preparation.jobs import ENTRY, REFERENCE, Job

if TYPE_CHECKING:
    from transom.artifacts import Cache

ROOM = 8
"""Free memory needed, as a multiple of the model's files. The reference unpacks one weight at a time, to float32."""
HEARTBEAT = 0.25
"""Seconds between two progress reports."""


def worth_a_process(job: Job, cache: Cache, free: int | None) -> bool:
    """Whether the reference outputs are needed and not cached, and a core and memory are free to compute them.

    Args:
        free: free bytes of the host's memory, whatever the device; None where unknown.
    """
    wanted = job.verify or not job.runs  # an export writes the reference outputs into the bundle
    if not wanted or job.graph or len(this_host().affinity) < 2:
        return False
    # Imported here, because the child process imports this module and has to start the second process without delay.
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
def reference_in_parallel(payload: Mapping[str, Any]) -> Iterator[Future[Any]]:
    """While the block runs, a child process computes the reference outputs of this job and keeps them in the cache.

    The end of the block stops it.
    """
    stop = threading.Event()

    def cancel_at_end(stage: str, share: float | None) -> None:
        if stop.is_set():
            raise Cancelled

    with ThreadPoolExecutor(1, thread_name_prefix="transom-reference") as threads:
        try:
            yield threads.submit(run_in_child, ENTRY, {**payload, "work": REFERENCE}, progress=cancel_at_end)
        finally:
            stop.set()


def wait_for(reference: Future[Any], progress: Progress) -> None:
    """Wait until the process has ended, whatever its result."""
    while not reference.done():
        wait([reference], timeout=HEARTBEAT)
        progress("reference", None)
