"""The card that is measured, or the CPU in a dry run, and its memory bandwidth."""

from __future__ import annotations

import importlib
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from parts import clocks
from parts.running import NoCard

from transom import hardware
from transom.contract import Device, Offer
from transom.errors import TransomError
from transom_tensorrt import TensorRt

if TYPE_CHECKING:
    from rtx_parts.bench import RtxBench

PACKAGES = ("transom", "tensorrt-rtx", "tensorrt", "cuda-bindings", "onnxruntime", "numpy", "onnx-ir")
BACKEND = TensorRt()
COPIES = 16
"""Copies in a row before the host waits."""
ROUNDS = 5
DRY_BYTES = 64 << 30


@dataclass(frozen=True)
class RtxCard:
    """A card as the backend sees it."""

    device: Device
    dry: bool
    """Whether the CPU replaces the card."""

    @property
    def free(self) -> int:
        """Bytes of free memory."""
        if self.dry:
            return DRY_BYTES
        from transom_tensorrt.cuda import CudaCard as Memory

        memory = Memory(self.device)
        try:
            free: int = memory.free_bytes()
            return free
        finally:
            memory.close()

    def describe(self) -> dict[str, Any]:
        device = self.device
        return {
            "name": device.name or device.id, "arch": "emulated" if self.dry else device.arch,
            "memory_bytes": device.memory_bytes, "identity": device.identity,
        }  # fmt: skip

    def state(self) -> dict[str, Any]:
        """See `parts.clocks.state`; empty in a dry run."""
        return {} if self.dry else clocks.state(self.device)

    def versions(self) -> dict[str, Any]:
        return clocks.versions(PACKAGES, self.device)


def here(dry: bool) -> RtxCard:
    """The first card that the backend offers to use, or the CPU.

    Raises:
        NoCard: there is no usable card.
    """
    devices = [d for d in hardware.probe_devices() if d.kind == ("cpu" if dry else "cuda")]
    answers = {a.device_id: a for a in BACKEND.probe(devices)}
    refused = []
    for device in devices:
        answer = answers[device.id]
        if not isinstance(answer, Offer):
            refused.append(f"{device.id}: {answer.reason} ({answer.fix})".replace(" ()", ""))
            continue
        card = RtxCard(device, dry)
        try:
            _ = card.free
        except TransomError as e:
            refused.append(f"{device.id}: {e.cause}")
            continue
        return card
    raise NoCard(BACKEND.name, refused)


def run(bench: RtxBench) -> None:
    """The part: how fast the card copies its own memory, which bounds other figures."""
    table = bench.table(
        "The card's memory",
        "Copying from the card's memory to itself reads and writes every byte: twice the size by the median time. It "
        "is the bound of decoding, which reads and hardly writes.",
    )
    size = min(bench.sizes.copied, bench.card.free // 4)
    seconds = _copying(bench, size)
    bench.document.bounds["copy_bytes_per_second"] = 2 * size / seconds
    bench.row(table, what="copy", MB=size / 1e6, ms=seconds * 1e3, GB_per_s=2 * size / seconds / 1e9)


def _copying(bench: RtxBench, size: int) -> float:
    """Seconds of a copy of `size` bytes."""
    if bench.dry:
        return 1e-3
    from transom_tensorrt.cuda import CudaCard as Memory

    runtime = importlib.import_module("cuda.bindings.runtime")
    memory = Memory(bench.card.device, runtime)
    try:
        source, target = memory.allocate(size), memory.allocate(size)
        memory.wait()
        times = []
        for _ in range(ROUNDS + 1):
            began = time.perf_counter()
            for _ in range(COPIES):
                across = runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
                (status,) = runtime.cudaMemcpyAsync(target, source, size, across, memory.stream)
                if int(status):
                    raise RuntimeError(f"the card cannot copy its own memory: CUDA {int(status)}")
            memory.wait()
            times.append((time.perf_counter() - began) / COPIES)
        return statistics.median(times[1:])
    finally:
        memory.close()
