"""The backend's answer for each device, from the host's records and installed files alone: imports no SDK."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from transom.authoring.packages import installed_version, package_refusal, version_numbers
from transom.contract import Device, Offer, Refusal
from transom.errors import option

ARCHITECTURES = (70, 80, 86, 89, 90)
"""Supported architectures: 80 for sm_80."""
OLDEST_TRITON = (3, 6)
OLDEST_TORCH = (2, 9)
VOLTA_TORCH = (2, 10)
"""The last release of torch whose packages support sm_70, built with CUDA 12."""
INSTALL = "pip install 'transom[cuda]'"
INSTALL_VOLTA = "pip install 'transom[v100]'"
FORMAT = "1"
"""Version of the files that this backend writes."""
INTERPRET = "TRITON_INTERPRET"


@dataclass(frozen=True)
class Torch:
    """An installed torch."""

    version: str
    cuda: str
    """Its CUDA version, `"12.8"`; empty for a build without CUDA."""


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, which must be set before triton is imported."""
    return os.environ.get(INTERPRET) == "1"


@functools.cache
def installed_torch() -> Torch | None:
    """The installed torch, or None. Its CUDA is read from its files, since importing it takes seconds."""
    try:
        distribution = importlib.metadata.distribution("torch")
    except importlib.metadata.PackageNotFoundError:
        return None
    try:
        text = Path(str(distribution.locate_file("torch/version.py"))).read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"^cuda\b[^=\n]*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return Torch(distribution.version, found.group(1) if found else "")


def architecture(device: Device) -> int:
    """80 for sm_80; 0 for a device that is not an NVIDIA GPU."""
    found = re.fullmatch(r"sm_(\d+)", device.arch)
    return int(found.group(1)) if found else 0


def tiles_architecture(device: Device) -> int:
    """The architecture that tiles are chosen for: `tiles.INTERPRETER` for the interpreter."""
    return 0 if interpreting() else architecture(device)


def answer(
    device: Device, torch: Torch | str | None = "installed", triton: str | None = "installed"
) -> Offer | Refusal:
    """An offer or a refusal for one device.

    Args:
        torch, triton: installed versions, passed by tests.
    """
    torch = installed_torch() if isinstance(torch, str) else torch
    triton = installed_version("triton") if triton == "installed" else triton
    if device.members:
        return _together([answer(member, torch, triton) for member in device.members], device)
    if interpreting():
        return _interpreted(device, torch, triton)
    arch = architecture(device)
    if device.kind not in ("cuda", "remote") or not arch:
        what = "a device that is only compiled for" if device.kind == "remote" else f"a device of kind {device.kind}"
        return Refusal(device.id, "wrong_device", f"runs on NVIDIA GPUs only; {device.id} is {what}")
    if arch not in ARCHITECTURES:
        known = ", ".join(f"sm_{a}" for a in ARCHITECTURES)
        return Refusal(device.id, "missing_feature", f"has kernels for {known}, and this is {device.arch}")
    install = INSTALL_VOLTA if arch == 70 else INSTALL
    if refusal := package_refusal(device, "triton", triton, OLDEST_TRITON, install):
        return refusal
    if device.kind == "remote":
        return Offer(device.id, _band(arch), f"{device.arch}, Triton {triton}{_products(arch)}", runs_here=False)
    if refusal := _torch_refusal(device, arch, torch, install):
        return refusal
    assert torch is not None
    why = f"{device.arch}, Triton {triton}, torch {torch.version}{_products(arch)}"
    # Kernels add in an order that follows from the step, without atomics, and cuBLAS repeats its bits on one stream.
    return Offer(device.id, _band(arch), why, deterministic=True)


def _band(arch: int) -> Literal["tuned", "native"]:
    """RTX cards prefer TensorRT if it is installed, since its FP8 products suit them best."""
    return "native" if arch in (86, 89) else "tuned"


def _together(answers: list[Offer | Refusal], device: Device) -> Offer | Refusal:
    """For a group: a combined offer, or the first refusal."""
    refused = next((a for a in answers if isinstance(a, Refusal)), None)
    if refused is not None:
        return replace(refused, device_id=device.id, reason=f"{refused.device_id}: {refused.reason}")
    first = answers[0]
    assert isinstance(first, Offer)
    linked = all(other.id in d.peers for d in device.members for other in device.members if other is not d)
    link = "NVLink" if linked else "no NVLink between all of them"
    why = f"{first.why}, {len(answers)} devices together, {link}"
    return replace(first, device_id=device.id, why=why, deterministic=False)  # NCCL promises no order of its sums


def _products(arch: int) -> str:
    """A note for the user on how products are computed."""
    return ", without tensor cores, which Triton has not had for sm_70 since 3.2" if arch == 70 else ""


def _torch_refusal(device: Device, arch: int, torch: Torch | None, install: str) -> Refusal | None:
    if refusal := package_refusal(device, "torch", torch.version if torch else None, OLDEST_TORCH, install):
        return refusal
    assert torch is not None
    if not torch.cuda:
        return Refusal(
            device.id, "missing_dep", f"the installed torch {torch.version} is a build without CUDA",
            "pip uninstall torch, and then " + install,
        )  # fmt: skip
    if arch == 70 and (version_numbers(torch.version) > VOLTA_TORCH or version_numbers(torch.cuda) >= (13,)):
        return Refusal(
            device.id, "missing_dep",
            f"the installed torch {torch.version} (CUDA {torch.cuda}) has no code for sm_70; 2.10 with CUDA 12 has",
            install,
        )  # fmt: skip
    driver = device.drivers.get("cuda", "")
    if driver and version_numbers(driver)[:1] < version_numbers(torch.cuda)[:1]:
        return Refusal(
            device.id, "too_old",
            f"torch {torch.version} needs a driver for CUDA {torch.cuda}, and this one has {driver}",
            f"Update NVIDIA's driver, or install a torch for CUDA {version_numbers(driver)[0]}",
        )  # fmt: skip
    return None


def _interpreted(device: Device, torch: Torch | None, triton: str | None) -> Offer | Refusal:
    """The answer in Triton's interpreter, where kernels run on the CPU regardless of the cards."""
    if device.kind != "cpu":
        reason = f"{INTERPRET}=1 is set: kernels run in Triton's interpreter, on the CPU"
        return Refusal(device.id, "wrong_device", reason, f"Unset {INTERPRET}, or use {option('device', 'cpu')}")
    for name, there in (("triton", triton), ("torch", torch)):
        if there is None:
            return Refusal(device.id, "missing_dep", f"the package {name} is not installed", INSTALL)
    why = f"Triton {triton}'s interpreter, for tests: some thousand times slower"
    return Offer(device.id, "fallback", why, deterministic=True)


@functools.cache
def kernels_digest() -> str:
    """Digest of the kernels' sources and of the modules that choose variants; a change rebuilds artifacts."""
    here = Path(__file__).parent
    digest = hashlib.blake2b(digest_size=8)
    for path in [*sorted((here / "kernels").glob("*.py")), *(here / f"{n}.py" for n in COMPILED_FROM)]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


COMPILED_FROM = ("tiles", "operators", "attention", "routing", "routes", "lowering", "packing", "sharding", "aot")


def requirements(device: Device) -> dict[str, str]:
    """The requirements of an artifact compiled here: everything that `check` compares."""
    interpreted = interpreting()
    return {
        "format": FORMAT,
        "arch": "interpreted" if interpreted else device.arch,
        "devices": str(max(1, len(device.members))),
        "triton": installed_version("triton") or "none",
        "kernels": kernels_digest(),
    }
