"""NVIDIA GPUs, through NVML (`nvidia-ml-py`). Opens no CUDA context, and imports nothing if there is no driver.

Ids follow the PCI bus and honor `CUDA_VISIBLE_DEVICES`. CUDA itself may order unlike GPUs otherwise (fastest first),
so a backend finds its GPU by the PCI address that `identity` begins with, never by the number in the id.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transom.contract import Device
from transom.hardware.architectures import cuda_features

_HINTS = ("proc/driver/nvidia/version", "dev/nvidiactl", "dev/dxg", "dev/nvhost-ctrl-gpu", "dev/nvhost-ctrl")
"""One of these exists if there is an NVIDIA driver: bare metal, container, WSL, Jetson."""


@dataclass(frozen=True)
class _Gpu:
    """A GPU's handle, and the handle of its MIG instance if it has one."""

    handle: Any
    instance: Any = None


def probe_nvidia(
    host: Device,
    *,
    root: Path = Path("/"),
    nvml: Any = None,
    environment: Mapping[str, str] = os.environ,
    platform: str = sys.platform,
) -> tuple[list[Device], list[str]]:
    """The GPUs, and notes about problems. Never raises; without a driver both lists are empty.

    Args:
        host: the CPU, whose memory an integrated GPU shares.
        root, nvml, environment, platform: for tests; the file system, the `pynvml` module, the variables, the system.
    """
    if platform == "linux" and not any((root / hint).exists() for hint in _HINTS):
        return [], _unclaimed(root)
    if nvml is None:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return [], ["An NVIDIA driver is present but the package nvidia-ml-py is not: pip install nvidia-ml-py"]
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return [], _init_notes(nvml, error, platform)
    try:
        return _devices(nvml, host, environment)
    except nvml.NVMLError as error:
        return [], [f"The NVIDIA driver answered with an error ({error}); try: nvidia-smi"]
    finally:
        with suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _init_notes(nvml: Any, error: Any, platform: str) -> list[str]:
    value = getattr(error, "value", None)
    if value == nvml.NVML_ERROR_LIBRARY_NOT_FOUND:
        if platform != "linux":
            return []  # elsewhere nothing hinted at a driver
        return [
            "An NVIDIA driver is loaded but its library libnvidia-ml.so.1 is not here. In a container, start it with "
            "--gpus all and NVIDIA_DRIVER_CAPABILITIES=compute,utility"
        ]
    if value == nvml.NVML_ERROR_DRIVER_NOT_LOADED and platform != "linux":
        return []
    return [f"The NVIDIA driver does not answer ({error}); try: nvidia-smi"]


def _unclaimed(root: Path) -> list[str]:
    """A note if the PCI bus has an NVIDIA GPU without a driver."""
    for vendor in sorted((root / "sys/bus/pci/devices").glob("*/vendor")):
        with suppress(OSError):
            if vendor.read_text().strip() != "0x10de":
                continue
            if (vendor.parent / "class").read_text().startswith("0x03"):
                return [
                    f"An NVIDIA GPU is on the PCI bus ({vendor.parent.name}) but no NVIDIA driver is here. "
                    "Install one; in a container, start it with --gpus all"
                ]
    return []


def _devices(nvml: Any, host: Device, environment: Mapping[str, str]) -> tuple[list[Device], list[str]]:
    notes: list[str] = []
    drivers = {"nvidia": _text(nvml.nvmlSystemGetDriverVersion())}
    with suppress(nvml.NVMLError):
        version = int(nvml.nvmlSystemGetCudaDriverVersion_v2())
        drivers["cuda"] = f"{version // 1000}.{version % 1000 // 10}"
    everything: list[_Gpu | None] = []
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            everything.append(_Gpu(nvml.nvmlDeviceGetHandleByIndex(index)))
        except nvml.NVMLError as error:
            everything.append(None)  # keeps the numbers of the others
            notes.append(f"NVIDIA GPU {index} does not answer ({error}); try: nvidia-smi -i {index}")
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    gpus = everything if visible is None else list(_visible(nvml, everything, visible))
    if visible is not None and everything and not gpus:
        notes.append(f'CUDA_VISIBLE_DEVICES="{visible}" hides every NVIDIA GPU; unset it to use them')
    found: list[tuple[_Gpu, Device]] = []
    for gpu in gpus:
        if gpu is None:
            continue
        try:
            found.append((gpu, _device(nvml, gpu, f"cuda:{len(found)}", host, drivers)))
        except nvml.NVMLError as error:
            notes.append(f"An NVIDIA GPU does not describe itself ({error}); try: nvidia-smi -q")
    unlike = len({device.name for _, device in found}) > 1
    if unlike and environment.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        notes.append("GPUs are numbered by PCI bus here; for other programs to agree set CUDA_DEVICE_ORDER=PCI_BUS_ID")
    return _with_peers(nvml, found), notes


def _visible(nvml: Any, gpus: Sequence[_Gpu | None], variable: str) -> Iterator[_Gpu | None]:
    """The GPUs that `CUDA_VISIBLE_DEVICES` names, in its order. As in CUDA, the first wrong entry ends the list."""
    for entry in (part.strip() for part in variable.split(",")):
        if entry.isdigit():
            if int(entry) >= len(gpus):
                return
            yield gpus[int(entry)]
        elif entry.startswith("MIG-"):
            instance = _ask(nvml, None, nvml.nvmlDeviceGetHandleByUUID, entry)
            if instance is None:
                return
            yield _Gpu(nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(instance), instance)
        else:
            uuids = [(gpu, _text(_ask(nvml, "", nvml.nvmlDeviceGetUUID, gpu.handle))) for gpu in gpus if gpu]
            named = [gpu for gpu, uuid in uuids if entry and uuid.startswith(entry)]
            if len(named) != 1:
                return
            yield named[0]


def _device(nvml: Any, gpu: _Gpu, id: str, host: Device, drivers: Mapping[str, str]) -> Device:
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(gpu.handle)
    name = _text(nvml.nvmlDeviceGetName(gpu.handle))
    address = _pci_address(_text(nvml.nvmlDeviceGetPciInfo(gpu.handle).busId))
    instance = gpu.instance or _first_instance(nvml, gpu.handle)
    if instance is not None:
        name = _text(_ask(nvml, f"{name} MIG", nvml.nvmlDeviceGetName, instance))
    memory = _ask(nvml, None, nvml.nvmlDeviceGetMemoryInfo, instance or gpu.handle)
    # A GPU without memory of its own (Jetson, GB10) does not answer: it uses the machine's.
    total, free = (int(memory.total), int(memory.free)) if memory else (host.memory_bytes, host.free_bytes)
    return Device(
        kind="cuda",
        id=id,
        arch=f"sm_{major}{minor}",
        memory_bytes=total,
        free_bytes=free,
        integrated=memory is None,
        identity=f"pci:{address} {name}",
        name=name,
        features=cuda_features(major, minor, name) | ({"mig"} if instance is not None else set()),
        drivers=drivers,
    )


def _first_instance(nvml: Any, handle: Any) -> Any:
    """The MIG instance that CUDA would use; None if the GPU is not partitioned."""
    mode = _ask(nvml, (0, 0), nvml.nvmlDeviceGetMigMode, handle)
    return _ask(nvml, None, nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, 0) if mode[0] else None


def _with_peers(nvml: Any, found: Sequence[tuple[_Gpu, Device]]) -> list[Device]:
    """Add which GPUs reach each other over NVLink, directly or through a switch."""
    peers: dict[str, set[str]] = {device.id: set() for _, device in found}
    for index, (gpu, device) in enumerate(found):
        for other, other_device in found[index + 1 :]:
            link = nvml.NVML_P2P_CAPS_INDEX_NVLINK
            status = _ask(nvml, None, nvml.nvmlDeviceGetP2PStatus, gpu.handle, other.handle, link)
            if status == nvml.NVML_P2P_STATUS_OK:
                peers[device.id].add(other_device.id)
                peers[other_device.id].add(device.id)
    return [replace(device, peers=frozenset(peers[device.id])) for _, device in found]


def _ask(nvml: Any, otherwise: Any, question: Callable[..., Any], *arguments: Any) -> Any:
    """The result of an NVML call, or `otherwise` if this GPU or driver does not support it."""
    try:
        return question(*arguments)
    except nvml.NVMLError:
        return otherwise


def _pci_address(bus_id: str) -> str:
    """`00000000:65:00.0`, as NVML writes it, in the kernel's form: `0000:65:00.0`."""
    domain, _, rest = bus_id.lower().partition(":")
    return f"{domain[-4:].rjust(4, '0')}:{rest}"


def _text(value: str | bytes) -> str:
    """Old versions of the binding return bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value
