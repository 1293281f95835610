"""Measures time on the device."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from parts.timing import Clock

Run = Callable[[], Any]
FLUSH_BYTES = 64 << 20
"""Least number of bytes written between two runs; twice the L2 cache if that is more."""


class Timer:
    """Medians from CUDA events. Compared calls take turns, and other memory is written before each run, so that nothing
    is in the L2 cache, and the host is ahead of the device at the first event.

    Args:
        l2: bytes of the L2 cache.
    """

    def __init__(self, device: Any, l2: int, clock: Clock) -> None:
        import torch

        self._torch, self._device, self._clock = torch, device, clock
        self._scratch = torch.zeros(max(FLUSH_BYTES, 2 * l2), dtype=torch.uint8, device=device)

    def interleaved(
        self, runs: Mapping[str, Run], seconds: float = 1.0, least: int = 3, most: int = 50
    ) -> dict[str, float]:
        """Median seconds of each run.

        Args:
            seconds: limit for all rounds together, if `least` rounds fit into it.
        """
        took = sum(self._once(run) for run in runs.values())  # libraries initialize, clocks rise
        took = min(took, sum(self._once(run) for run in runs.values()))
        rounds = max(least, min(most, int(seconds / max(took, 1e-6))))
        found: dict[str, list[float]] = {name: [] for name in runs}
        names = list(runs)
        for i in range(rounds):
            if i >= 1 and self._clock.left <= 0:
                break
            for name in names[i % len(names) :] + names[: i % len(names)]:
                found[name].append(self._once(runs[name]))
        return {name: statistics.median(times) for name, times in found.items()}

    def seconds(self, run: Run, seconds: float = 0.5) -> float:
        return self.interleaved({"": run}, seconds)[""]

    def recorded(self, calls: Sequence[Run]) -> Run:
        """All calls as one CUDA graph, so that the host's launch time does not count."""
        from transom_cuda_triton.graphs import cuda_record

        def run() -> Any:
            for call in calls:
                call()
            return self._scratch

        replay, _ = cuda_record(run)
        self._torch.cuda.synchronize()
        return replay

    def _once(self, run: Run) -> float:
        cuda = self._torch.cuda
        begin, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        self._scratch.zero_()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


class FakeTimer:
    """Runs everything once and reports one millisecond."""

    def interleaved(
        self, runs: Mapping[str, Run], seconds: float = 1.0, least: int = 3, most: int = 50
    ) -> dict[str, float]:
        for run in runs.values():
            run()
        return dict.fromkeys(runs, 1e-3)

    def seconds(self, run: Run, seconds: float = 0.5) -> float:
        return self.interleaved({"": run})[""]

    def recorded(self, calls: Sequence[Run]) -> Run:
        return lambda: [call() for call in calls]
