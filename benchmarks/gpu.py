"""The backend `cuda_triton` on one NVIDIA card, in one command and under ten minutes: is it right, and how fast is it?

    make bench-gpu                                          # or, where torch for CUDA and triton are installed:
    python benchmarks/gpu.py --out benchmarks/results/gpu-{card}.json
    python benchmarks/gpu.py --only prefill decode --quick
    python benchmarks/gpu.py --dry-run                      # no card: toy sizes in Triton's interpreter, no real times

First the checks: every kernel against the reference, through the machine code that is compiled ahead of time and the
driver; the conformance kit in float16 and bfloat16; and generated tokens, which must match the reference's. A failure
is printed and makes the exit status 1, and timing continues. Then the times of the operators that the engine runs. All
weights are random, and nothing is downloaded. The result has the card's clocks, temperature and power before and after
each part.

Exit status: 0, everything is done and right; 1, a result is wrong or a part failed; 2, no card; 3, the time was up
before everything was measured, and the result is partial.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from parts.running import NO_CARD, OK, NoCard, begin, finish, options, perform

LIMIT = 570.0
"""Seconds of a run: the results up to then are written, and the process ends well before ten minutes."""
PARTS: dict[str, tuple[str, float]] = {
    "kernels": ("gpu_parts.kernels:run", 110),
    "conformance": ("gpu_parts.conformance:run", 85),
    "bounds": ("gpu_parts.bounds:run", 10),
    "products": ("gpu_parts.products:run", 45),
    "decode": ("gpu_parts.attention:decode", 45),
    "model": ("gpu_parts.model:run", 160),
    "prefill": ("gpu_parts.attention:prefill", 115),
}
"""The parts in order: their functions and time limits in seconds, which add up to that of a run."""


def bench_for(arguments: argparse.Namespace, command: Sequence[str]) -> Any:
    """A bench on the card of this machine.

    Raises:
        NoCard: there is no usable card.
    """
    from dataclasses import replace

    from gpu_parts.bench import QUICK, TOY, GpuBench, GpuSizes
    from gpu_parts.card import here
    from gpu_parts.timing import FakeTimer, Timer
    from parts.report import Document
    from parts.timing import Clock

    clock = Clock(arguments.limit)
    card = here(arguments.dry_run)
    sizes = TOY if arguments.dry_run else replace(GpuSizes(), **QUICK) if arguments.quick else GpuSizes()
    timer = FakeTimer() if card.dry else Timer(card.device, card.l2, clock)
    about = Document("gpu", card.describe(), card.versions(), card.dry, list(command))
    return GpuBench(card, clock, about, arguments.seed, timer, sizes, arguments.quick, Path(arguments.scratch))


def measure(arguments: argparse.Namespace, command: Sequence[str]) -> int:
    try:
        bench = bench_for(arguments, command)
    except NoCard as e:
        print(e, file=sys.stderr)
        return NO_CARD
    watch = begin(bench, arguments.out)
    try:
        for name, (where, seconds) in PARTS.items():
            if name in (arguments.only or PARTS) or (name == "bounds" and arguments.only):
                perform(bench, name, where, seconds)
    finally:
        watch.cancel()
    return finish(bench, arguments.out)


def main(command: Sequence[str] | None = None) -> int:
    command = list(sys.argv[1:] if command is None else command)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options(parser)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), help="only these parts, and the card's bounds")
    parser.add_argument("--quick", action="store_true", help="fewer cases, lengths and densities")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of the whole run")
    parser.add_argument("--scratch", default=tempfile.gettempdir(), help="a folder for compiled models, on a disk")
    parser.add_argument("--child-cold", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args(command)
    if arguments.child_cold is not None:
        from gpu_parts.model import child

        child(Path(arguments.child_cold[0]), float(arguments.child_cold[1]))
        return OK
    if arguments.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    else:
        os.environ.pop("TRITON_INTERPRET", None)
    return measure(arguments, command)


if __name__ == "__main__":
    sys.exit(main())
