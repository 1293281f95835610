"""The measurements of `transom bench`: one process per backend, taking turns, with medians over the rounds."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import secrets
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from transom.contract import Device, Offer
from transom.errors import OptionError, SelectionError, nearest

Tell = Callable[[str, float | None], None]


@dataclass(frozen=True)
class BenchPlan:
    """What to measure."""

    model: str
    options: Mapping[str, Any]
    """Keyword arguments of `transom.load`, without device and backend."""
    prompts: tuple[int, ...]
    """Prompt lengths in tokens."""
    new_tokens: int
    rounds: int
    patience: float
    """Timeout of one measurement, in seconds."""


@dataclass
class BenchRow:
    """One backend on one device, and its measurements so far."""

    backend: str
    version: str
    device: Device
    error: str = ""
    report: dict[str, Any] = field(default_factory=dict)
    load_seconds: float = 0.0
    compile_seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    """Memory of the process after the last measurement, in bytes."""
    prefill: dict[int, list[float]] = field(default_factory=dict)
    """Prompt length -> tokens per second of each round."""
    decode: dict[int, list[float]] = field(default_factory=dict)
    """Prompt length -> tokens per second of decoding after it, of each round."""
    given_up: set[int] = field(default_factory=set)
    """Prompt lengths that ran into the timeout."""

    def median(self, kind: str, prompt: int) -> float | None:
        values = getattr(self, kind).get(prompt)
        return statistics.median(values) if values else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "backend": self.backend,
            "version": self.version,
            "device": self.device.id,
            "device_name": self.device.name,
            "error": self.error or None,
            "precision": self.report.get("precision", ""),
            "load_seconds": self.load_seconds,
            "compile_seconds": self.compile_seconds,
            "memory_bytes": self.memory,
            "prefill_tokens_per_second": {n: self.median("prefill", n) for n in self.prefill},
            "decode_tokens_per_second": {n: self.median("decode", n) for n in self.decode},
            "rounds": {"prefill": self.prefill, "decode": self.decode},
            "given_up": sorted(self.given_up),
        }


def rows_for(devices: Sequence[str], backends: Sequence[str], probe_file: str | None = None) -> list[BenchRow]:
    """Every backend with an offer for a device of this machine, or only those named.

    Raises:
        OptionError: an unknown device or backend.
        SelectionError: none of them makes an offer.
    """
    from pathlib import Path

    from transom import hardware
    from transom.loading.machine import survey

    machine = survey(Path(probe_file) if probe_file else None)
    known = machine.plugins.backends
    for name in backends:
        if name not in known:
            raise OptionError(f'Unknown backend "{name}"', nearest(name, known))
    ids = [hardware.find(machine.devices, name).id for name in devices]
    by_id = {d.id: d for d in machine.devices}
    rows = [
        BenchRow(name, known[name].version, by_id[answer.device_id])
        for name, answer in machine.answers
        if isinstance(answer, Offer)
        and answer.runs_here
        and (name in backends if backends else not answer.by_name)
        and (answer.device_id in ids if ids else by_id[answer.device_id].kind != "remote")
    ]
    if not rows:
        said = [f"{n} on {a.device_id}: {getattr(a, 'reason', '')}" for n, a in machine.answers if hasattr(a, "reason")]
        raise SelectionError("No backend can run on these devices", "See: transom backends", said)
    return rows


def bench(plan: BenchPlan, rows: Sequence[BenchRow], tell: Tell) -> None:
    """Measure all rows in turns; the results are stored in the rows."""
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(_Worker()) for _ in rows]
        for row, worker in zip(rows, workers, strict=True):
            tell(f"Loading with {row.backend} on {row.device.id}", None)
            _load(plan, row, worker)
        total = plan.rounds * len(plan.prompts) * len(rows)
        turn = 0
        for number in range(plan.rounds):
            # Each round starts with another backend, so that none always runs right after the same one.
            order = [(i + number) % len(rows) for i in range(len(rows))]
            for prompt in sorted(plan.prompts):
                for place in order:
                    row = rows[place]
                    turn += 1
                    tell(f"Round {number + 1}, {prompt} tokens, {row.backend} on {row.device.id}", turn / (total + 1))
                    if not row.error and not any(length <= prompt for length in row.given_up):
                        _measure(plan, row, workers[place], prompt)


def _load(plan: BenchPlan, row: BenchRow, worker: _Worker) -> None:
    options = {**plan.options, "device": row.device.id, "backend": row.backend}
    answer = worker.ask({"do": "load", "model": plan.model, "options": options})
    row.error = answer.get("error", "")
    if not row.error:
        row.report, row.memory = answer["report"], answer["memory"]
        row.load_seconds, row.compile_seconds = answer["load_seconds"], answer["compile_seconds"]


def _measure(plan: BenchPlan, row: BenchRow, worker: _Worker, prompt: int) -> None:
    request = {"do": "measure", "prompt_tokens": prompt, "new_tokens": plan.new_tokens, "patience": plan.patience}
    answer = worker.ask({**request, "seed": secrets.randbits(32)})
    if "error" in answer:
        row.error = answer["error"]
        return
    row.memory = answer["memory"]
    if answer["given_up"]:
        row.given_up.add(prompt)
    if answer["prefill"]:
        row.prefill.setdefault(prompt, []).append(answer["prefill"])
    if answer["decode"]:
        row.decode.setdefault(prompt, []).append(answer["decode"])


class _Worker:
    """The parent's end of `transom.cli.bench_worker`."""

    def __init__(self) -> None:
        path = [entry for entry in sys.path if isinstance(entry, str)]
        start = f"import sys; sys.path[:] = {path!r}; from transom.cli.bench_worker import main; main()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", start], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self._tail: list[str] = []
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        for work, pipe in ((self._read_answers, self._process.stdout), (self._read_errors, self._process.stderr)):
            assert pipe is not None
            threading.Thread(target=work, args=(pipe,), daemon=True, name="transom-bench").start()

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *raised: object) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=5 if raised[0] is None else 0.1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer; if the process ended, the reason under `error`."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            return {"error": self._end()}
        line = self._lines.get()
        answer: dict[str, Any] = json.loads(line) if line else {"error": self._end()}
        return answer

    def _end(self) -> str:
        status = self._process.wait()
        last = next((line for line in reversed(self._tail) if line.strip()), "")
        how = f"signal {-status}" if status < 0 else f"status {status}"
        return f"its process ended with {how}" + (f": {last}" if last else "")

    def _read_answers(self, pipe: IO[bytes]) -> None:
        for line in pipe:
            self._lines.put(line)
        self._lines.put(b"")

    def _read_errors(self, pipe: IO[bytes]) -> None:
        for line in pipe:
            self._tail = [*self._tail[-20:], line.decode("utf-8", "replace").rstrip()]


def machine_facts(rows: Sequence[BenchRow]) -> dict[str, Any]:
    """The facts needed to interpret the numbers: machine, cores, versions, load average."""
    import platform

    from transom.cli.diagnosis import package_versions

    devices = {row.device.id: row.device for row in rows}
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "devices": {d.id: {"name": d.name, "cores": d.cores, "drivers": dict(d.drivers)} for d in devices.values()},
        "packages": package_versions(),
        "load_average_before": load,
    }


def best(rows: Sequence[BenchRow], kind: str, prompt: int) -> float | None:
    """The best median of all rows."""
    return max(_medians(rows, kind, prompt), default=None)


def _medians(rows: Sequence[BenchRow], kind: str, prompt: int) -> Iterator[float]:
    for row in rows:
        if (median := row.median(kind, prompt)) is not None:
            yield median
