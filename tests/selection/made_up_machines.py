"""Made-up machines, and backends reduced to what they say about a device. Everything here is pure data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from transom.contract import Device, Offer, Refusal
from transom.hardware.architectures import cuda_features

GIB = 1 << 30
AVX2 = frozenset({"sse4_2", "avx", "avx2", "fma", "f16c", "x86-64-v2", "x86-64-v3"})
AVX512 = AVX2 | {"avx512f", "avx512_vnni", "x86-64-v4"}


def cpu(name: str, features: Iterable[str], gib: int = 64) -> Device:
    return Device("cpu", "cpu", "x86_64", gib * GIB, gib * GIB // 2, name=name, features=frozenset(features), cores=8)


def cuda(name: str, major: int, minor: int, gib: int, index: int = 0) -> Device:
    features = cuda_features(major, minor, name)
    return Device("cuda", f"cuda:{index}", f"sm_{major}{minor}", gib * GIB, name=name, features=features)


XEON = cpu("Xeon Platinum", AVX512 | {"amx_tile", "amx_int8"}, 512)
DESKTOP = cpu("Core i9", AVX2)
OLD = cpu("Core 2", {"sse4_2", "x86-64-v2"}, 8)
V100 = cuda("Tesla V100", 7, 0, 16)
A100 = cuda("A100", 8, 0, 80)
H100 = cuda("H100", 9, 0, 80)
RTX_4090 = cuda("RTX 4090", 8, 9, 24)
IRIS = Device("gpu", "gpu:0", "intel_gpu_v12", 60 * GIB, integrated=True, name="Iris Xe")
ARC = Device("gpu", "gpu:1", "intel_gpu_v20", 12 * GIB, name="Arc B580")
NPU = Device("npu", "npu:0", "intel_npu_3720", 60 * GIB, integrated=True, name="AI Boost")
PHONE = Device("remote", "remote:snapdragon-8-gen-2", "hexagon_v73", 0, name="Snapdragon 8 Gen 2")

LAPTOP = (DESKTOP, IRIS, NPU)
TWO_CARDS = (XEON, replace(A100, id="cuda:0"), replace(A100, id="cuda:1"))

Judge = Callable[[Device], Offer | Refusal]


def wrong(device: Device, wanted: str) -> Refusal:
    return Refusal(device.id, "wrong_device", f"is made for {wanted}, not for {device.kind}")


def reference(device: Device) -> Offer | Refusal:
    return Offer(device.id, "fallback", "NumPy") if device.kind == "cpu" else wrong(device, "CPUs")


def openvino_cpu(device: Device) -> Offer | Refusal:
    if device.kind != "cpu":
        return wrong(device, "CPUs")
    if "avx2" not in device.features:
        return Refusal(device.id, "missing_feature", "needs AVX2, which this CPU lacks")
    return Offer(device.id, "native", "AVX2 and OpenVINO")


def openvino_missing(device: Device) -> Offer | Refusal:
    if device.kind != "cpu":
        return wrong(device, "CPUs")
    return Refusal(device.id, "missing_dep", "OpenVINO is not installed", "pip install 'transom[openvino]'")


def openvino_other(device: Device) -> Offer | Refusal:
    return Offer(device.id, "native", "OpenVINO") if device.kind in ("gpu", "npu") else wrong(device, "Intel GPUs")


def cuda_triton(device: Device) -> Offer | Refusal:
    if device.kind != "cuda":
        return wrong(device, "NVIDIA GPUs")
    if "bf16" not in device.features:
        return Offer(device.id, "generic", f"{device.arch}, fp16 only")
    return Offer(device.id, "native", f"{device.arch} with bf16")


def triton_missing(device: Device) -> Offer | Refusal:
    if device.kind != "cuda":
        return wrong(device, "NVIDIA GPUs")
    return Refusal(device.id, "missing_dep", "Triton is not installed", "pip install 'transom[cuda]'")


def tensorrt(device: Device) -> Offer | Refusal:
    runs_here = device.kind != "remote"
    if device.kind not in ("cuda", "remote"):
        return wrong(device, "NVIDIA GPUs")
    if "fp8" not in device.features or "wgmma" in device.features:
        return Refusal(device.id, "missing_feature", f"needs sm_89, found {device.arch}")
    return Offer(device.id, "tuned", f"{device.arch} with FP8", runs_here)


def mobile_export(device: Device) -> Offer | Refusal:
    if not device.arch.startswith("hexagon"):
        return wrong(device, "Snapdragons")
    return Offer(device.id, "tuned", "QNN compiles for it", runs_here=False)


BACKENDS: dict[str, Judge] = {
    "reference": reference,
    "openvino_cpu": openvino_cpu,
    "openvino_other": openvino_other,
    "cuda_triton": cuda_triton,
    "tensorrt": tensorrt,
    "mobile_export": mobile_export,
}
"""Everything installed and working."""


def ask(devices: Sequence[Device], backends: dict[str, Judge]) -> list[tuple[str, Offer | Refusal]]:
    """What `Plugins.probe` would return."""
    return [(name, judge(device)) for name, judge in sorted(backends.items()) for device in devices]
