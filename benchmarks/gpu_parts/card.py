"""The card that is measured; in a dry run, the CPU with Triton's interpreter instead."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as NotReady
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from typing import Any

from parts import clocks
from parts.running import NoCard

from transom import hardware
from transom.contract import Device, Offer
from transom.errors import EngineError
from transom_cuda_triton import CudaTriton
from transom_cuda_triton.variants import Code, KernelVariant, Launcher

PACKAGES = ("transom", "torch", "triton", "flashinfer-python", "numpy")
MOST_PROCESSES = 16
DRY_PROCESSORS = 4


@dataclass
class GpuCard:
    """A card as the backend sees it."""

    host: Device
    """The host's record, with the processor cores of this process: as many processes compile kernels."""
    device: Any
    """torch's device."""
    arch: int
    processors: int
    """Multiprocessors."""
    l2: int
    """Bytes of the L2 cache."""
    memory: int
    """Bytes of memory."""
    dry: bool
    number: str
    """Dtype of the measured attention and products, by Triton's name."""
    known: dict[KernelVariant, Code | str] = field(default_factory=dict)
    """Compiled code, or the reason why there is none."""

    @property
    def free(self) -> int:
        """Bytes of free memory."""
        if self.dry:
            return 64 << 30
        import torch

        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(self.device)[0])

    def compile(self, variants: Sequence[KernelVariant], seconds: float) -> dict[str, str]:
        """Compile missing variants; returns those that could not be compiled in that time, with reasons, by kernel."""
        missing = [v for v in dict.fromkeys(variants) if v not in self.known]
        if not self.dry and missing:
            self._compile(missing, seconds)
        found = {v: self.known.get(v) for v in variants}
        return {v.kernel: str(why) for v, why in found.items() if isinstance(why, str)}

    def _compile(self, missing: Sequence[KernelVariant], seconds: float) -> None:
        from transom_cuda_triton.aot import compile_code

        end = time.monotonic() + seconds
        pool = ProcessPoolExecutor(max(1, min(self.host.cores, MOST_PROCESSES, len(missing))), get_context("spawn"))
        try:
            futures = {v: pool.submit(compile_code, v, self.arch) for v in missing}
            for variant, future in futures.items():
                try:
                    self.known[variant] = future.result(timeout=max(0.0, end - time.monotonic()))
                except NotReady:
                    continue  # another part may have time for it
                except Exception as e:  # noqa: BLE001  any exception of the compiler is a finding
                    said = str(e).strip().splitlines() or [type(e).__name__]
                    self.known[variant] = f"Triton cannot compile it: {said[-1]}"
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def launcher(self, variants: Sequence[KernelVariant], seconds: float = 60.0) -> Launcher:
        """Starts these variants, as the engine's launcher does.

        Raises:
            RuntimeError: one of them could not be compiled.
        """
        from transom_cuda_triton.launching import DriverLauncher, InterpretingLauncher

        if self.dry:
            return InterpretingLauncher()
        self.compile(variants, seconds)
        wrong = {v.kernel: self.known.get(v, "there was no time to compile it") for v in variants}
        failed = {kernel: why for kernel, why in wrong.items() if isinstance(why, str)}
        if failed:
            raise RuntimeError("; ".join(f"{kernel}: {why}" for kernel, why in failed.items()))
        return DriverLauncher({v: self.known[v] for v in variants}, self.stream)  # type: ignore[misc]

    def stream(self) -> int:
        import torch

        return int(torch.cuda.current_stream(self.device).cuda_stream)

    def synchronize(self) -> None:
        if not self.dry:
            import torch

            torch.cuda.synchronize(self.device)

    # what it is -------------------------------------------------------------------------------------------------------
    def describe(self) -> dict[str, Any]:
        found = {
            "name": self.host.name or self.host.id, "arch": "interpreted" if self.dry else self.host.arch,
            "memory_bytes": self.memory, "multiprocessors": self.processors, "l2_bytes": self.l2,
            "identity": self.host.identity,
        }  # fmt: skip
        if not self.dry:
            import torch

            about = torch.cuda.get_device_properties(self.device)
            clock, width = getattr(about, "memory_clock_rate", 0), getattr(about, "memory_bus_width", 0)
            found["peak_bytes_per_second"] = 2.0 * clock * 1e3 * width / 8
        return found

    def state(self) -> dict[str, Any]:
        """Clocks (MHz), temperature (°C), power (W) and reasons for throttling, from NVML; empty in a dry run."""
        if self.dry:
            return {}
        return clocks.state(self.host)

    def versions(self) -> dict[str, Any]:
        import torch

        torchs = {"cuda of torch": torch.version.cuda or "", "cudnn": str(torch.backends.cudnn.version() or "")}
        return clocks.versions(PACKAGES, self.host) | torchs


def here(dry: bool) -> GpuCard:
    """The first card that the backend offers to use, or the CPU.

    Raises:
        NoCard: there is no usable card.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    devices = list(hardware.probe_devices())
    answers: Mapping[str, Any] = {a.device_id: a for a in CudaTriton().probe(devices)}
    cards = [d for d in devices if d.kind == ("cpu" if dry else "cuda")]
    taken = [d for d in cards if isinstance(answers[d.id], Offer)]
    if not taken:
        refused = [f"{d.id}: {answers[d.id].reason} ({answers[d.id].fix})".replace(" ()", "") for d in cards]
        raise NoCard(CudaTriton.name, refused)
    host = replace(taken[0], cores=cores)
    import torch

    from transom_cuda_triton import probing

    if dry:
        device = torch.device("cpu")
        return GpuCard(host, device, probing.tiles_architecture(host), DRY_PROCESSORS, 1 << 20, 1 << 30, True, "fp32")
    from transom_cuda_triton.loading import _place

    try:
        place = _place(host)
    except EngineError as e:
        raise NoCard(CudaTriton.name, [str(e)]) from e
    about = torch.cuda.get_device_properties(place.device)
    return GpuCard(
        host, place.device, probing.architecture(host), place.processors, int(about.L2_cache_size),
        int(about.total_memory), False, "fp16",
    )  # fmt: skip
