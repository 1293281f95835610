"""Offers, refusals and verdicts, decided from the host's device records and installed packages alone."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transom.authoring.packages import installed_version, package_refusal, version_numbers
from transom.contract import Device, Offer, Refusal, Verdict

INSTALL = "pip install 'transom[qnn]'"
QNN, ORT = "onnxruntime-qnn", "onnxruntime"
OLDEST = (2, 7)
"""The oldest onnxruntime-qnn that this backend was tested with."""
FORMAT = "1"
"""Version of the files that this backend writes."""
SHARING_SINCE = 73
"""The first Hexagon version on which the graphs of a context share their weights."""
SOC_MODELS: Mapping[int, tuple[str, int]] = {
    36: ("SM8450", 69), 42: ("SM8475", 69), 43: ("SM8550", 73), 57: ("SM8650", 75), 60: ("SC8380XP", 73),
    69: ("SM8750", 79), 87: ("SM8850", 81),
}  # fmt: skip
"""`QNN_SOC_MODEL_*` -> chip, Hexagon version: QNN's QnnTypes.h and its table of supported devices. QNN's compiler
silently accepts any pair of the two; a binary for a wrong pair does not open on the phone."""


CHIP_KEYS = ("soc_model", "htp_arch")
"""The numbers of a chip, as `Device.drivers` and `Artifact.requires` name them."""


@dataclass(frozen=True)
class Chip:
    """A chip to compile for."""

    soc_model: int
    htp_arch: int
    """73 for Hexagon v73."""


EMULATED = Chip(43, 73)
"""The chip to compile for if the emulator will run the model."""


def answer(device: Device, packages: Mapping[str, str] | None = None) -> Offer | Refusal:
    """An offer or a refusal for one device.

    Args:
        packages: the result of `installed`; given by tests.
    """
    if device.kind == "cpu":
        return _emulator(device, installed() if packages is None else packages)
    if device.kind != "remote" or not device.arch.startswith("hexagon_"):
        reason = (
            f"compiles for the HTP of Snapdragon chips; {device.id} is a device of kind {device.kind}, {device.arch}"
        )
        return Refusal(device.id, "wrong_device", reason)
    chip = chip_of(device)
    if isinstance(chip, str):
        return Refusal(device.id, "wrong_device", chip, "Name a target of: transom export --target list")
    packages = installed() if packages is None else packages
    refused = _missing(device, packages)
    return refused or Offer(device.id, "tuned", f"{device.arch}, QNN {packages[QNN]}", runs_here=False)


def chip_of(device: Device) -> Chip | str:
    """The chip of a device that is only compiled for, or the reason why this backend cannot compile for it."""
    found = re.fullmatch(r"hexagon_v(\d{1,9})", device.arch)
    numbers = [device.drivers.get(key, "") for key in CHIP_KEYS]
    if found is None or not all(re.fullmatch(r"[0-9]{1,9}", n) for n in numbers):
        return f"{device.id} does not identify its chip: `drivers` has no numbers soc_model and htp_arch"
    version, (soc_model, htp_arch) = int(found.group(1)), map(int, numbers)
    if version < 69:
        return f"Hexagon v{version} has neither float16 nor 4-bit blocks; v69 and newer are served"
    if soc_model not in SOC_MODELS:
        known = ", ".join(f"{number} ({name})" for number, (name, _) in SOC_MODELS.items())
        return f"soc_model {soc_model} is not known here; known are {known}"
    name, right = SOC_MODELS[soc_model]
    if right != htp_arch or right != version:
        return (
            f"soc_model {soc_model} is {name}, whose HTP is v{right}, but {device.id} has v{htp_arch} ({device.arch})"
        )
    return Chip(soc_model, htp_arch)


def target(device: Device) -> Chip:
    """The chip of an offered device."""
    chip = EMULATED if device.kind == "cpu" else chip_of(device)
    assert isinstance(chip, Chip)
    return chip


def shares(device: Device) -> bool:
    """Whether prefill and decode share one context with one copy of the weights.

    The emulator crashes on a context with shared weights (onnxruntime-qnn 2.7): it gets one context for each graph.
    """
    return device.kind == "remote" and target(device).htp_arch >= SHARING_SINCE


def _missing(device: Device, packages: Mapping[str, str]) -> Refusal | None:
    machine = packages.get("machine", "")
    if machine not in ("x86_64", "amd64"):
        reason = f"QNN's compiler runs on x86-64, and this machine is {machine or 'unknown'}"
        return Refusal(device.id, "missing_feature", reason, "Compile on a machine with an x86-64 processor")
    missing = package_refusal(device, ORT, packages.get(ORT), (), INSTALL)
    return missing or package_refusal(device, QNN, packages.get(QNN), OLDEST, INSTALL)


def _emulator(device: Device, packages: Mapping[str, str]) -> Offer | Refusal:
    if device.arch != "x86_64":
        return Refusal(device.id, "wrong_device", f"Qualcomm's HTP emulator runs on x86_64, not on {device.arch}")
    why = f"Qualcomm's HTP emulator, for checking: QNN {packages.get(QNN)}, onnxruntime {packages.get(ORT)}"
    return _missing(device, packages) or Offer(device.id, "fallback", why, by_name=True)


@functools.cache
def installed() -> Mapping[str, str]:
    """Versions of the installed packages by name, and `machine`, Python's name of the processor."""
    import platform

    found = {"machine": platform.machine().lower()}
    return found | {package: version for package in (QNN, ORT) if (version := installed_version(package))}


def requirements(device: Device, context: int, sdk_version: str) -> dict[str, str]:
    """Requirements of a model compiled for a device.

    Args:
        sdk_version: version of the QNN SDK that compiled it, such as `2.51.0`; `qnn` is that of its Python package.
    """
    chip = target(device)
    return {
        "format": FORMAT, "soc_model": str(chip.soc_model), "htp_arch": str(chip.htp_arch), "qnn": installed()[QNN],
        "qnn_sdk": sdk_version, "context": str(context), "weights": "shared" if shares(device) else "apart",
    }  # fmt: skip


def judge(requires: Mapping[str, str], device: Device, packages: Mapping[str, str] | None = None) -> Verdict:
    """Whether an artifact can be opened on this device. A context opens on the chip that it was compiled for, with the
    QNN version that compiled it or a newer one; the emulator opens those for any chip, unless graphs share weights."""
    packages = installed() if packages is None else packages
    if requires.get("format") != FORMAT:
        return Verdict("rebuild", "its files are those of another version of Transom's backend qnn")
    if device.kind == "cpu":
        offer = _emulator(device, packages)
        if isinstance(offer, Refusal):
            return Verdict("never", offer.reason)
        if (pair := _known_pair(requires)) is not None:
            return pair
        if requires.get("weights") != "apart":
            reason = "its graphs share their weights, which Qualcomm's emulator cannot open: it runs on the chip alone"
            return Verdict("never", reason)
        return _new_enough(requires, packages)
    chip = chip_of(device) if device.kind == "remote" else f"{device.id} has no HTP"
    if isinstance(chip, str):
        return Verdict("never", chip)
    if requires.get("weights") not in ("apart", "shared"):
        return Verdict("rebuild", "it does not state how its graphs store their weights")
    wanted = requires.get("soc_model", ""), requires.get("htp_arch", "")
    if wanted != (str(chip.soc_model), str(chip.htp_arch)):
        made_for = f"soc_model {wanted[0]}, htp_arch {wanted[1]}"
        return Verdict("rebuild", f"compiled for {made_for}; {device.id} has {chip.soc_model}, {chip.htp_arch}")
    return _new_enough(requires, packages)


def fits(variant: Mapping[str, Any], device: Device) -> Verdict:
    """Whether a variant in a manifest is for a device's chip; its two numbers are compared as text."""
    wanted, found = ([str(of.get(key, "")) for key in CHIP_KEYS] for of in (variant["requires"], device.drivers))
    if wanted == found:
        return Verdict("ok")
    target, named = variant["target"], f"{device.name or device.id} ({device.arch})"
    made_for = f"Is made for {target['name'] or target['id']} ({target['arch']})"
    if not any(found):
        return Verdict("never", f"{made_for}, and {named} does not state which Snapdragon it is")
    pair = " and ".join(f"{key} {text or 'none'}" for key, text in zip(CHIP_KEYS, wanted, strict=True))
    own = " and ".join(text or "none" for text in found)
    return Verdict("never", f"{made_for}: {pair}; {named} has {own}")


def _known_pair(requires: Mapping[str, str]) -> Verdict | None:
    """A verdict if the chip that an artifact was compiled for is not a known one; None if it is."""
    soc_model, htp_arch = requires.get("soc_model", ""), requires.get("htp_arch", "")
    if (soc_model, htp_arch) in {(str(number), str(version)) for number, (_, version) in SOC_MODELS.items()}:
        return None
    return Verdict("rebuild", f"compiled for soc_model {soc_model or '(none)'} with htp_arch {htp_arch or '(none)'}, "
                   "which is not a chip")  # fmt: skip


def _new_enough(requires: Mapping[str, str], packages: Mapping[str, str]) -> Verdict:
    made_by, here = requires.get("qnn", ""), packages.get(QNN, "")
    if version_numbers(made_by) < OLDEST:
        return Verdict("rebuild", f"compiled with {QNN} {made_by or '(no version)'}, older than this backend knows")
    if re.fullmatch(r"\d+\.\d+\.\d+", requires.get("qnn_sdk", "")) is None:
        return Verdict("rebuild", "it does not state which version of QNN's SDK compiled it")
    if here and version_numbers(here) < version_numbers(made_by):
        return Verdict("rebuild", f"compiled with {QNN} {made_by}, and here is {here}")
    return Verdict("ok")


def libraries(htp_arch: int) -> tuple[str, ...]:
    """File names of the shared libraries that an Android app needs to open a context. The compiler,
    `libQnnHtpPrepare.so`, is not among them."""
    stub, skel = (f"libQnnHtpV{htp_arch}{what}.so" for what in ("Stub", "Skel"))
    provider = "libonnxruntime_providers_qnn.so"
    return ("libonnxruntime.so", provider, "libQnnHtp.so", "libQnnSystem.so", stub, skel)


def machine_of(library: str) -> str:
    """The processor that a shared library is compiled for: the skeletons (`libQnnHtpV73Skel.so`) run on the DSP."""
    return "hexagon" if "Skel" in library else ""
