"""Measures which of two compiled forms of a decoder is faster here, the native one or OpenVINO's.

Used on unmeasured processors and on request: see `native.choosing.measures`.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from transom.contract import Artifact, Device, Options, Session, Work
from transom_openvino_cpu.loading import load_artifact

PROMPT, ANSWER = 1024, 32
"""Tokens to read and to generate; a smaller context has fewer to read."""
ROUNDS = 3
"""The best one counts."""
MARGIN = 0.9
"""OpenVINO must take less than this share of the native time: only the native kernels have fast sparse attention."""
MEMORY = 4
"""Free memory needed, in sizes of the model: OpenVINO holds its weights, mostly in 8 bits, and the exported file."""


UNMEASURED = "native kernels were chosen without measuring"


class RunTimes(NamedTuple):
    """Seconds for the prompt and for the answer."""

    prompt: float
    answer: float
    tokens: tuple[int, int]

    def __str__(self) -> str:
        return (
            f"{self.tokens[0]} tokens read in {self.prompt:.3f} s and {self.tokens[1]} written in {self.answer:.3f} s"
        )


def short_of_memory(native: Artifact, device: Device) -> str:
    """A note that memory is too small to compile the other form; empty if it is not."""
    size = sum(
        content.stat().st_size if isinstance(content, Path) else len(content) for content in native.files.values()
    )
    free = device.free_bytes if device.free_bytes is not None else device.memory_bytes
    if MEMORY * size <= free:
        return ""
    return (
        f"{UNMEASURED}: compiling with OpenVINO too needs {MEMORY * size / 1e9:.1f} GB "
        f"of free memory, and {free / 1e9:.1f} GB are free"
    )


def faster(native: Artifact, openvino: Artifact, device: Device, options: Options) -> Artifact:
    """The faster of two artifacts of the same decoder, with a note of both times.

    Raises:
        EngineError: one of them cannot be run.
    """
    ours, theirs = times(native, device, options), times(openvino, device, options)
    keep = openvino if sum(theirs[:2]) < MARGIN * sum(ours[:2]) else native
    which = "OpenVINO's" if keep is openvino else "the native ones"
    note = f"native kernels: {ours}; OpenVINO's own: {theirs}; measured here at compile time, {which} were kept"
    return replace(keep, notes=[*keep.notes, note])


def times(artifact: Artifact, device: Device, options: Options) -> RunTimes:
    """The best of `ROUNDS` runs of an artifact."""
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for name, content in artifact.files.items():
            files[name] = content if isinstance(content, Path) else Path(folder, name)
            if isinstance(content, bytes):
                files[name].write_bytes(content)
        session = load_artifact(replace(artifact, files=files), device, options)
        try:
            return min((_run(session) for _ in range(ROUNDS)), key=lambda found: found.prompt + found.answer)
        finally:
            session.close()


def _run(session: Session) -> RunTimes:
    answer = min(ANSWER, session.limits.context // 2)
    prompt = min(PROMPT, session.limits.context - answer)
    state = session.new_state()
    try:
        began = time.perf_counter()
        for start in range(0, prompt, session.limits.max_tokens):
            session.step([Work(state, [0] * min(session.limits.max_tokens, prompt - start))])
        read = time.perf_counter()
        for _ in range(answer):
            session.step([Work(state, [0])])
        return RunTimes(read - began, time.perf_counter() - read, (prompt, answer))
    finally:
        state.free()
