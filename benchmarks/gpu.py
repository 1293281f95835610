"""The backend `cuda_triton` on one NVIDIA card, in one command and under ten minutes: what it computes, and how fast.

    make bench-gpu                                          # or, where torch for CUDA and triton are installed:
    python benchmarks/gpu.py --out benchmarks/results/gpu-{card}.json
    python benchmarks/gpu.py --only prefill decode --quick
    python benchmarks/gpu.py --dry-run                      # no card: toy sizes in Triton's interpreter, no real times
    python benchmarks/gpu.py --docs benchmarks/results/*.json   # writes a section of docs/performance.md

First the numbers: every kernel against the reference, through the machine code that is compiled ahead of time and the
driver; the conformance kit in float16 and bfloat16; and generations that must be the reference's. A failure is printed
and makes the exit status 1, and timing goes on. Then the times, of the operators that the engine runs. All weights are
random, and nothing is fetched. The card's clocks, temperature and power stand in the result before and after each part.

Exit status: 0, all done and right; 1, a number is wrong or a part failed; 2, no card; 3, the time was up before all was
measured, and what was stands in the result.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import secrets
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

LIMIT = 570.0
"""Seconds of a run: what is measured then is written, and the process ends well before ten minutes."""
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
OK, WRONG, NO_CARD, CUT = 0, 1, 2, 3
PARTS: dict[str, tuple[str, float]] = {
    "kernels": ("gpu_parts.kernels:run", 110),
    "conformance": ("gpu_parts.conformance:run", 85),
    "bounds": ("gpu_parts.bounds:run", 10),
    "products": ("gpu_parts.products:run", 45),
    "decode": ("gpu_parts.attention:decode", 45),
    "model": ("gpu_parts.model:run", 160),
    "prefill": ("gpu_parts.attention:prefill", 115),
}
"""In order: what runs them, and seconds that each may take; together what a run has."""


def function(name: str) -> Callable[[Any], None]:
    """`"module:function"`. Imported when it is needed: a dry run sets the interpreter first."""
    from importlib import import_module

    module, _, of = name.partition(":")
    found: Callable[[Any], None] = getattr(import_module(module), of)
    return found


def bench_for(arguments: argparse.Namespace, command: Sequence[str]) -> Any:
    """A bench on the card of this machine.

    Raises:
        gpu_parts.card.NoCard: there is none.
    """
    from dataclasses import replace

    from gpu_parts.bench import QUICK, TOY, Bench, Sizes
    from gpu_parts.card import here
    from gpu_parts.report import Document
    from gpu_parts.timing import Clock, FakeTimer, Timer

    clock = Clock(arguments.limit)
    card = here(arguments.dry_run)
    sizes = TOY if arguments.dry_run else replace(Sizes(), **QUICK) if arguments.quick else Sizes()
    timer = FakeTimer() if card.dry else Timer(card.device, card.l2, clock)
    document = Document(card.describe(), card.versions(), card.dry, list(command))
    seed = secrets.randbits(32) if arguments.seed is None else arguments.seed
    return Bench(card, clock, timer, sizes, arguments.quick, document, seed, Path(arguments.scratch))


def write(bench: Any, path: str | None) -> None:
    """The result so far; `{card}` in the path is the card's name."""
    bench.document.seconds = round(bench.clock.now, 1)
    if path is None:
        return
    name = re.sub(r"[^a-z0-9]+", "-", str(bench.document.card["name"]).lower()).strip("-")
    target = Path(path.replace("{card}", name))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(bench.document.to_dict(), indent=1) + "\n")
    bench.say(f"wrote {target}")


def run_part(bench: Any, name: str) -> None:
    """One part: whatever happens within stands in its state."""
    from gpu_parts.report import Part
    from gpu_parts.timing import OutOfTime

    where, seconds = PARTS[name]
    part = Part(name)
    bench.document.parts.append(part)
    if bench.clock.part(seconds) <= 0:
        part.state, part.reason = "left out", "the time of the whole run was up"
        return
    began = bench.clock.now
    bench.say(f"== {name}, at most {bench.clock.left:.0f} s")
    part.clocks.append(bench.card.state())
    try:
        function(where)(bench)
        part.state = "done"
    except OutOfTime:
        part.state, part.reason = "cut", f"it had {seconds:.0f} s"
    except Exception as e:  # noqa: BLE001  the other parts shall run all the same
        said = str(e).strip().splitlines() or [""]
        part.state, part.reason = "failed", f"{type(e).__name__}: {said[0]}"
        traceback.print_exc()
    part.clocks.append(bench.card.state())
    part.seconds = round(bench.clock.now - began, 2)
    bench.say(f"== {name}: {part.state} {part.reason}")


def status_of(document: Any) -> int:
    """The exit status for what a run has found."""
    if any(c["outcome"] == "failed" for c in document.checks) or any(p.state == "failed" for p in document.parts):
        return WRONG
    late = ("time was up", "no time")
    left_out = any(c["outcome"] == "left out" and any(t in c["reason"] for t in late) for c in document.checks)
    return CUT if left_out or any(p.state != "done" for p in document.parts) else OK


def stop(bench: Any, path: str | None) -> None:
    """The time is up while something still runs: write what there is, and end this process and those it started."""
    for part in bench.document.parts:
        if part.state == "running":
            part.state, part.reason = "cut", "the time of the whole run was up"
    bench.document.status = status_of(bench.document)
    write(bench, path)
    for process in multiprocessing.active_children():
        process.kill()
    sys.stdout.flush()
    os._exit(bench.document.status or CUT)


def measure(arguments: argparse.Namespace, command: Sequence[str]) -> int:
    from gpu_parts.card import NoCard

    try:
        bench = bench_for(arguments, command)
    except NoCard as e:
        print(f"No NVIDIA card is here that cuda_triton can use ({e}); without one, use --dry-run.", file=sys.stderr)
        return NO_CARD
    about = bench.document
    bench.say(f"{about.card['name']} ({about.card['arch']}), seed {bench.seed}")
    bench.say(", ".join(f"{name} {value}" for name, value in about.versions.items() if value))
    watch = threading.Timer(arguments.limit + 10, stop, (bench, arguments.out))
    watch.daemon = True
    watch.start()
    for name in PARTS:
        if name in (arguments.only or PARTS) or (name == "bounds" and arguments.only):
            run_part(bench, name)
    watch.cancel()
    about.status = status_of(about)
    for check in about.checks:
        if check["outcome"] == "failed":
            print(f"FAILED  {check['name']}: {check['reason']}")
    for part in about.parts:
        if part.state != "done":
            print(f"{part.state}  {part.name}: {part.reason}")
    write(bench, arguments.out)
    counts = {o: sum(c["outcome"] == o for c in about.checks) for o in ("passed", "failed", "left out")}
    print(f"checks: {', '.join(f'{n} {o}' for o, n in counts.items())}; {about.seconds:.0f} s; status {about.status}")
    return about.status


def document(paths: Sequence[Path]) -> None:
    """Write the section of docs/performance.md from result files.

    Raises:
        ValueError: one is of a dry run, whose times are none, or is no result.
    """
    from gpu_parts.report import replaced

    found = [json.loads(path.read_text()) for path in sorted(paths)]
    for path, result in zip(sorted(paths), found, strict=True):
        if result["dry"]:
            raise ValueError(f"{path} is of a dry run: it has no times")
    DOCUMENT.write_text(replaced(DOCUMENT.read_text(encoding="utf-8"), found), encoding="utf-8")
    print(f"wrote {DOCUMENT} from {len(found)} results")


def main(command: Sequence[str] | None = None) -> int:
    command = list(sys.argv[1:] if command is None else command)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", help="the JSON file to write; {card} in it becomes the card's name")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), help="these parts alone, and the card's bounds")
    parser.add_argument("--quick", action="store_true", help="fewer cases, lengths and densities")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes in Triton's interpreter: all but the card")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of the whole run")
    parser.add_argument("--seed", type=int, help="of the random inputs; a fresh one by default")
    parser.add_argument("--scratch", default=tempfile.gettempdir(), help="a folder for compiled models, on a disk")
    parser.add_argument(
        "--docs", nargs="*", type=Path, metavar="FILE", help="write the section of docs/performance.md from these"
    )
    parser.add_argument("--child-cold", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args(command)
    if arguments.docs is not None:
        try:
            document(arguments.docs)
        except (OSError, ValueError) as e:
            print(e, file=sys.stderr)
            return WRONG
        return OK
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
