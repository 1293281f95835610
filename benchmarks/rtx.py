"""The backend `tensorrt` on one RTX card, in one command and under ten minutes: is it right, and how fast is it?

    make bench-rtx                                          # or, where tensorrt-rtx and cuda-bindings are installed:
    python benchmarks/rtx.py --out benchmarks/results/rtx-{card}.json
    python benchmarks/rtx.py --only dense                   # only decoding and prompts of an 8B-shaped model
    python benchmarks/rtx.py --full                         # all 32 layers instead of a few; about half an hour
    python benchmarks/rtx.py --dry-run                      # no card: tiny shapes in ONNX Runtime, no real times

First the card's bandwidth, and the logits of SmolLM2-135M in every precision against the reference. Then engines of an
8B-shaped model with random weights and few layers are built. They separate the cost of a layer from the cost of the
rest; the figures of all 32 layers are computed from these, with the arithmetic beside them.

Exit status: 0, everything is done and right; 1, a result is wrong or a part failed; 2, no card; 3, the time was up
before everything was measured, and the result is partial.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from parts.running import NO_CARD, OK, WRONG, NoCard, begin, finish, function, options, perform

LIMIT, FULL_LIMIT = 560.0, 3600.0
"""Seconds of a run, and of one with `--full`."""
PARTS: dict[str, tuple[str, float]] = {
    "card": ("rtx_parts.card:run", 10),
    "fidelity": ("rtx_parts.fidelity:run", 130),
    "build": ("rtx_parts.building:run", 230),
    "dense": ("rtx_parts.decoding:dense", 60),
    "sparse": ("rtx_parts.decoding:sparse_and_batches", 60),
    "cold": ("rtx_parts.cold:run", 70),
}
"""The parts in order: their functions and time limits in seconds; a part may also use time left by earlier ones."""
ALWAYS = ("card", "build")
"""Parts that always run: the card's bound, and building the measured engines."""
CHILDREN = {name: f"rtx_parts.{module}:child" for name, module in
            (("build", "building"), ("fidelity", "fidelity"), ("cold", "cold"))}  # fmt: skip


def measure(arguments: argparse.Namespace, command: Sequence[str]) -> int:
    from parts.report import Document
    from parts.timing import Clock
    from rtx_parts.bench import TOY, RtxBench, RtxSizes
    from rtx_parts.card import here

    limit = arguments.limit if arguments.limit is not None else FULL_LIMIT if arguments.full else LIMIT
    clock = Clock(limit)
    try:
        card = here(arguments.dry_run)
    except NoCard as e:
        print(e, file=sys.stderr)
        return NO_CARD
    sizes = TOY if arguments.dry_run else RtxSizes()
    depths = tuple(arguments.layers or ((sizes.whole,) if arguments.full else sizes.depths))
    about = Document("rtx", card.describe(), card.versions(), card.dry, list(command))
    parts = [name for name in PARTS if name in (arguments.only or PARTS)]
    folder = Path(tempfile.mkdtemp(prefix="transom-rtx-", dir=arguments.scratch))
    bench = RtxBench(card, clock, about, arguments.seed, replace(sizes, depths=depths), parts, folder)
    watch = begin(bench, arguments.out)
    try:
        ends = 0.0
        for name, (where, seconds) in PARTS.items():
            ends += seconds * limit / LIMIT
            if name in parts or name in ALWAYS:
                perform(bench, name, where, limit if arguments.only else ends - clock.now)
    finally:
        watch.cancel()
        shutil.rmtree(folder, ignore_errors=True)
    return finish(bench, arguments.out)


def child(what: str, given: str) -> int:
    """A process that `rtx_parts.children.ask` started; its last line states the error."""
    from transom.errors import TransomError

    try:
        function(CHILDREN[what])(json.loads(given))
    except TransomError as e:
        print(*e.details, f"{type(e).__name__}: {e.cause}", sep="\n", file=sys.stderr)
        return WRONG
    return OK


def main(command: Sequence[str] | None = None) -> int:
    command = list(sys.argv[1:] if command is None else command)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options(parser)
    parser.add_argument("--only", nargs="+", choices=[p for p in PARTS if p not in ALWAYS], help="only these parts")
    parser.add_argument("--layers", nargs="+", type=int, help="depths of the models that are built; two or more")
    parser.add_argument("--full", action="store_true", help="build and measure all layers; slow, and needs much memory")
    parser.add_argument(
        "--limit", type=float, help=f"seconds of the whole run; {LIMIT:.0f}, or {FULL_LIMIT:.0f} in full"
    )
    parser.add_argument("--scratch", default=tempfile.gettempdir(), help="a folder for engines, 20 GB, on a disk")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args(command)
    if arguments.layers and (len(set(arguments.layers)) < 2 or min(arguments.layers) < 1):
        parser.error("--layers takes two or more different depths; for the whole model there is --full")
    if arguments.child is not None:
        return child(*arguments.child)
    os.environ.pop("TRANSOM_TENSORRT_EMULATE", None)
    if arguments.dry_run:
        os.environ["TRANSOM_TENSORRT_EMULATE"] = "1"
    return measure(arguments, command)


if __name__ == "__main__":
    sys.exit(main())
