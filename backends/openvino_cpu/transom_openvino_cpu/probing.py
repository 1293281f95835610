"""The backend's answer for each device, from the host's records alone: imports no SDK and detects nothing."""

from __future__ import annotations

import os
import platform

from transom.authoring.packages import installed_version, package_refusal
from transom.contract import Device, Offer, Refusal
from transom.errors import option
from transom_openvino_cpu.native.choosing import SWITCH, level_on, measures
from transom_openvino_cpu.native.library import LEVEL_SWITCH, LEVELS

OLDEST = (2026, 4)
"""The first release whose PagedAttention has the inputs that `attention` writes."""
INSTALL = "pip install 'transom[openvino]'"


def isa(device: Device) -> str:
    """The instruction set that compiled code depends on: part of an artifact's requirements."""
    for name, needed in (
        ("amx", {"amx_bf16"}),
        ("avx512_bf16", {"avx512_bf16"}),
        ("avx512_vnni", {"avx512_vnni"}),
        ("avx512", {"avx512f", "avx512bw"}),
        ("avx_vnni", {"avx_vnni"}),
        ("avx2", {"avx2"}),
    ):
        if needed <= device.features:
            return name
    return "generic"


def answer(device: Device) -> Offer | Refusal:
    """An offer or a refusal for one device."""
    if device.kind != "cpu":
        what = "a device that is only compiled for" if device.kind == "remote" else f"a device of kind {device.kind}"
        return Refusal(
            device.id, "wrong_device", f"runs on the CPU only; {device.id} is {what}", f"Use {option('device', 'cpu')}"
        )
    version = installed_version("openvino")
    if refusal := package_refusal(device, "openvino", version, OLDEST, INSTALL):
        return refusal
    if device.arch not in ("x86_64", "aarch64", "arm64"):
        return Refusal(device.id, "missing_feature", f"openvino has no kernels for {device.arch}")
    if device.arch != "x86_64":
        # OpenVINO supports it; this backend has not been measured on it.
        return Offer(device.id, "generic", f"{device.arch}, OpenVINO {version}", deterministic=True)
    if (setting := os.environ.get(SWITCH, "")) not in ("", "0", "measure", "require"):
        fix = f"Set {SWITCH} to 0 or to measure, or do not set it"
        return Refusal(device.id, "failed", f"the environment variable {SWITCH} is {setting!r}", fix)
    if (limit := os.environ.get(LEVEL_SWITCH)) and limit not in LEVELS:
        fix = f"Set {LEVEL_SWITCH} to one of {', '.join(LEVELS)}, or do not set it"
        return Refusal(device.id, "failed", f"the environment variable {LEVEL_SWITCH} is {limit!r}", fix)
    kind = isa(device)
    if kind == "generic":
        why = f"x86-64 without AVX2 (slow), OpenVINO {version}"
        return Offer(device.id, "generic", why, deterministic=True)
    kernels = "native kernels, " if level_on(device) else ""
    return Offer(device.id, "native", f"x86-64 with {kind}, {kernels}OpenVINO {version}", deterministic=True)


def requirements(device: Device) -> dict[str, str]:
    """The requirements of an artifact compiled here: everything that `check` compares."""
    return {
        "format": FORMAT,
        "openvino": installed_version("openvino") or "none",
        "arch": device.arch,
        "isa": isa(device),
        "system": platform.system(),
        "native": (level_on(device) or "none") + (", or what is faster" if measures(device) else ""),
    }


FORMAT = "5"
"""Version of the files that this backend writes."""
