"""Offers, refusals and verdicts, decided from the host's device records and installed packages alone."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from transom.authoring.packages import installed_version, version_numbers
from transom.contract import Device, Offer, Refusal, Verdict
from transom.errors import option
from transom_tensorrt.sdk import CLASSIC, OLDEST, RTX, SERVED, Sdk, installed

INSTALL = "pip install 'transom[tensorrt]'"
FORMAT = "1"
"""Version of the files that this backend writes."""
EMULATE = "TRANSOM_TENSORRT_EMULATE"
EMULATED = "emulated"
FLOAT8_SINCE = 89
DATA_CENTERS = (80, 90, 100, 103)
"""Architectures that TensorRT-RTX is not made for, though it has code for sm_80."""
OUR_KERNELS = (70, 80, 86, 89, 90)
"""Architectures that the backend `cuda_triton` supports; a fix recommends it for these only."""
RUN_ONLY = frozenset({
    "__init__", "backend", "cuda", "emulating", "engine", "executing", "kernel_cache", "loading", "rtx", "session",
})  # fmt: skip
"""Modules of this package that take no part in writing networks or building engines."""


def emulating() -> bool:
    """Whether networks run in onnxruntime on the CPU instead of engines."""
    return os.environ.get(EMULATE) == "1"


def architecture(device: Device) -> int:
    """89 for sm_89; 0 if the device is not an NVIDIA GPU."""
    found = re.fullmatch(r"sm_(\d+)", device.arch)
    return int(found.group(1)) if found else 0


def sdk_for(device: Device, sdks: Sequence[Sdk]) -> Sdk | None:
    """The SDK for a device: tensorrt-rtx, or classic TensorRT, which builds only on a machine with the card. If both
    are possible, data-center cards use classic TensorRT."""
    arch = architecture(device)
    fit = [s for s in sdks if arch in SERVED[s.name] and not s.old and (s.crosses or device.kind == "cuda")]
    preferred = CLASSIC if arch in DATA_CENTERS else RTX
    return min(fit, key=lambda s: s.name != preferred, default=None)


def answer(
    device: Device, sdks: Sequence[Sdk] | None = None, packages: Mapping[str, str] | None = None
) -> Offer | Refusal:
    """An offer or a refusal for one device.

    Args:
        sdks, packages: installed SDKs and the result of `_packages`; given by tests.
    """
    sdks = installed() if sdks is None else sdks
    packages = _packages() if packages is None else packages
    if (setting := os.environ.get(EMULATE, "")) not in ("", "1"):
        fix = f"Set {EMULATE} to 1, or do not set it"
        return Refusal(device.id, "failed", f"the environment variable {EMULATE} is {setting!r}", fix)
    if device.members:
        ours = all(architecture(member) in OUR_KERNELS for member in device.members)
        fix = f"Use {option('backend', 'cuda_triton')} for several cards" if ours else "Name one of the cards"
        return Refusal(device.id, "wrong_device", "runs a model on one card, not on several together", fix)
    if emulating():
        return _emulated(device, packages)
    arch = architecture(device)
    if device.kind not in ("cuda", "remote") or not arch:
        what = "a device that is only compiled for" if device.kind == "remote" else f"a device of kind {device.kind}"
        return Refusal(device.id, "wrong_device", f"runs on NVIDIA GPUs only; {device.id} is {what}")
    sdk = sdk_for(device, sdks)
    if sdk is None:
        return _refused(device, arch, sdks)
    why = f"{device.arch}{' with FP8' if arch >= FLOAT8_SINCE else ''}, {sdk.name} {sdk.version}"
    if device.kind == "remote":
        return Offer(device.id, _band(arch), why, runs_here=False)
    if not packages.get("cuda"):
        return Refusal(device.id, "missing_dep", "the package cuda-bindings is not installed", INSTALL)
    return _old_driver(device, sdk, packages["cuda"]) or Offer(device.id, _band(arch), why)


def _old_driver(device: Device, sdk: Sdk, bindings: str) -> Refusal | None:
    """A refusal if the driver could not load an engine, which would take minutes to build."""
    needed = {f"{sdk.name} {sdk.version}": sdk.cuda, f"cuda-bindings {bindings}": _major(bindings)}
    by = max(needed, key=lambda name: needed[name])
    here, driver = _major(device.drivers.get("cuda", "")), device.drivers.get("nvidia", "that is here")
    if not here or here >= needed[by]:
        return None
    reason = f"{by} needs a driver with CUDA {needed[by]}, and the driver {driver} has CUDA {here}"
    return Refusal(device.id, "too_old", reason, "Update NVIDIA's driver")


def _major(version: str) -> int:
    """The major version; 0 if unknown."""
    return next(iter(version_numbers(version)), 0)


def _band(arch: int) -> Literal["tuned", "native"]:
    """Tuned where FP8 and engines for the exact card pay off. Elsewhere Transom's own kernels come first: they are fast
    without quantization."""
    return "tuned" if arch in (89, 120, 121) else "native"


def _refused(device: Device, arch: int, sdks: Sequence[Sdk]) -> Refusal:
    if arch < 75:
        fix = f"Use {option('backend', 'cuda_triton')}: pip install 'transom[v100]'" if arch in OUR_KERNELS else ""
        return Refusal(device.id, "wrong_device", f"TensorRT serves sm_75 and newer, and this is {device.arch}", fix)
    old = [s for s in sdks if s.old and arch in SERVED[s.name]]
    if old:
        least = ".".join(map(str, OLDEST[old[0].name]))
        return Refusal(
            device.id, "too_old", f"{old[0].name} {old[0].version} is installed and {least} or newer is needed",
            f"{INSTALL} -U" if old[0].name == RTX else "pip install -U tensorrt",
        )  # fmt: skip
    if arch in SERVED[RTX]:
        return Refusal(device.id, "missing_dep", "the package tensorrt-rtx is not installed", INSTALL)
    if arch not in SERVED[CLASSIC]:
        return Refusal(device.id, "missing_feature", f"TensorRT is not known to serve {device.arch}")
    if device.kind == "remote":
        reason = f"tensorrt-rtx does not build for {device.arch}, and classic TensorRT builds only where the card is"
        other = f"Use {option('backend', 'cuda_triton')}, or build" if arch in OUR_KERNELS else "Build"
        return Refusal(device.id, "missing_feature", reason, f"{other} on a machine with the card")
    reason = f"tensorrt-rtx does not serve {device.arch}, and classic TensorRT is not installed"
    return Refusal(device.id, "missing_dep", reason, "pip install tensorrt")


def _emulated(device: Device, packages: Mapping[str, str]) -> Offer | Refusal:
    if device.kind != "cpu":
        reason = f"{EMULATE}=1 is set: networks run in onnxruntime, on the CPU"
        return Refusal(device.id, "wrong_device", reason, f"Unset {EMULATE}, or use {option('device', 'cpu')}")
    if not packages.get("onnxruntime"):
        return Refusal(device.id, "missing_dep", "the package onnxruntime is not installed", "pip install onnxruntime")
    return Offer(device.id, "fallback", "TensorRT networks in onnxruntime, for tests: slow")


@functools.cache
def _packages() -> Mapping[str, str]:
    """Versions of the installed packages that this backend needs."""
    names = {"cuda": "cuda-bindings", "onnxruntime": "onnxruntime"}
    return {name: version for name, package in names.items() if (version := installed_version(package)) is not None}


@functools.cache
def code_digest() -> str:
    """Digest of the modules that write networks: engines made by other code are rebuilt."""
    return digest_of(Path(__file__).parent)


def digest_of(package: Path) -> str:
    """Digest of all modules except `RUN_ONLY`: a needless rebuild costs minutes, a missing one gives wrong results."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).with_suffix("").as_posix()
        if name not in RUN_ONLY:
            digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def requirements(device: Device) -> dict[str, str]:
    """Requirements of an engine built for a device: everything that `judge` compares, except the context."""
    if emulating():
        return {"format": FORMAT, "code": code_digest(), "arch": EMULATED, "sdk": "onnxruntime"}
    sdk = sdk_for(device, installed())
    named = f"{sdk.name} {sdk.version}" if sdk is not None else "none"
    return {"format": FORMAT, "code": code_digest(), "arch": device.arch, "sdk": named}


def judge(requires: Mapping[str, str], device: Device) -> Verdict:
    """Whether an engine can be opened on this device. An engine runs only on the architecture it was built for, with
    the version that built it; this is decided without opening it."""
    here = requirements(device)
    if requires.get("arch") != here["arch"]:
        return Verdict("rebuild", f"built for {requires.get('arch', 'an unknown card')}, and this is {here['arch']}")
    if requires.get("sdk") != here["sdk"]:
        return Verdict("rebuild", f"built by {requires.get('sdk', 'an unknown TensorRT')}, and here is {here['sdk']}")
    for key in ("format", "code"):
        if requires.get(key) != here[key]:
            return Verdict("rebuild", "built by another version of Transom's backend tensorrt")
    return Verdict("ok")
