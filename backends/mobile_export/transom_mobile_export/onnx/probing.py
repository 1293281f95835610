"""Offers, refusals and verdicts, decided from the host's device records and installed packages alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transom.authoring.packages import installed_version, package_refusal
from transom.contract import Device, Offer, Refusal, Verdict

INSTALL = "pip install 'transom[onnx]'"
FORMAT = "1"
"""Version of the files that this backend writes."""
NEEDED = "onnx_decoder"
"""The only requirement of such a model: a runtime that supports this format."""
OLDEST = (1, 24)
"""The oldest ONNX Runtime that all of these models were tested with."""
NAMED = "ONNX Runtime {} or newer, with GenAI"


def serves(device: Device) -> bool:
    """Whether models are written for this device, which is not present: the processor of a phone or board."""
    return device.kind == "remote" and (device.arch == "aarch64" or device.arch.startswith("hexagon_"))


def answer(device: Device) -> Offer | Refusal:
    """An offer or a refusal for one device."""
    if serves(device):
        return Offer(device.id, "generic", NAMED.format(".".join(map(str, OLDEST))), runs_here=False)
    if device.kind != "cpu" or device.members:
        reason = f"writes models for processors of phones and boards, and runs them on the CPU; {device.id} is neither"
        return Refusal(device.id, "wrong_device", reason)
    found = installed_version("onnxruntime")
    if refusal := package_refusal(device, "onnxruntime", found, OLDEST, INSTALL):
        return refusal
    return Offer(device.id, "generic", f"ONNX Runtime {found}", by_name=True)


def fits(variant: Mapping[str, Any], device: Device) -> Verdict:
    """Whether a variant in a manifest is for a device: one with a processor, which every system on a chip has."""
    named = f"{device.name or device.id} ({device.arch})"
    if device.kind == "cpu" or device.arch in ("aarch64", "x86_64") or device.arch.startswith("hexagon_"):
        return Verdict("ok", f"Runs on the processor of {named}")
    return Verdict("never", f"Runs on a processor, and {device.id} is not one")


def judge(requires: Mapping[str, str], device: Device) -> Verdict:
    """Whether a model can be opened on this device."""
    if requires.get(NEEDED) != FORMAT:
        return Verdict("rebuild", "written by another version of Transom's backend onnx")
    if device.kind == "cpu" or serves(device):
        return Verdict("ok")
    return Verdict("never", f"a portable ONNX decoder runs on CPUs, and {device.id} is not one")
