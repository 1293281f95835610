"""Which variants of a bundle are good on a device, told from the manifest alone.

Nothing is opened, no backend has to be installed, and the device does not have to be here: it may be one of the
catalogue, or what an app says about its phone. The rules are few so that programs in other languages can have the same
(`docs/bundles.md`); `examples/edge` has them in C++. What they cannot see is whether the runtime is there and new
enough: of that a backend judges when the bundle is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transom.bundles.manifest import AGAIN, BundleError, require_version
from transom.bundles.manifest_values import MALFORMED, count, text
from transom.contract import Device
from transom.preparation.memory import size
from transom.sources.resolve import BUNDLE_KEY

_CHIP = ("soc_model", "htp_arch")
_HEXAGON = "hexagon_"
_CPUS = ("aarch64", "x86_64")


@dataclass(frozen=True)
class VariantVerdict:
    """What is said of one variant."""

    name: str
    fits: bool
    reason: str
    """One sentence, for people."""
    context: int = 0
    """The longest context whose memory the manifest tells and that fits; 0: none does, or the graph has no context."""


def judge(manifest: Mapping[str, Any], device: Device) -> list[VariantVerdict]:
    """A verdict on each variant, in the manifest's order: whoever runs the bundle takes the first that fits.

    Args:
        manifest: the content of `manifest.json`.
        device: what it would run on. Of its memory `free_bytes` counts, else `memory_bytes`; without either nothing is
            too large.

    Raises:
        BundleError: the manifest is of a newer version, or damaged.
    """
    try:
        require_version(manifest[BUNDLE_KEY], "The bundle")
        return [_verdict(variant, device) for variant in manifest["variants"]]
    except MALFORMED as error:
        raise BundleError("The manifest of the bundle is damaged", AGAIN) from error


def _verdict(variant: Mapping[str, Any], device: Device) -> VariantVerdict:
    name = text(variant["name"])
    if wrong := _wrong_device(variant, device):
        return VariantVerdict(name, False, wrong)
    at = {int(context): count(needed) for context, needed in variant["memory"].get("at", {}).items()}
    whole = count(variant["context"])
    free = _free(device)
    if not at or free is None:
        portable = variant["backend"]["name"] == "onnx"
        reason = f"Runs on the processor of {_named(device)}" if portable else f"Is made for {_named(device)}"
        return VariantVerdict(name, True, reason, whole)
    longest = max((context for context, needed in at.items() if needed <= free), default=0)
    needed = at[whole]
    if needed <= free:
        reason = f"Needs {size(needed)} with its context of {whole} tokens, and {size(free)} are free"
        return VariantVerdict(name, True, reason, whole)
    rest = f"{longest} tokens would fit" if longest else "no context fits"
    reason = f"Needs {size(needed)} with its context of {whole} tokens, and {size(free)} are free: {rest}"
    return VariantVerdict(name, False, reason, longest)


def _wrong_device(variant: Mapping[str, Any], device: Device) -> str:
    """Why a variant is for other hardware; empty where it is for this."""
    backend, target, requires = variant["backend"]["name"], variant["target"], variant["requires"]
    made_for = f"{target['name'] or target['id']} ({target['arch']})"
    if backend == "onnx":
        return "" if _has_cpu(device) else f"Runs on a processor, and {device.id} is none"
    if backend == "qnn":
        wanted, found = ([str(numbers.get(key, "")) for key in _CHIP] for numbers in (requires, device.drivers))
        if wanted == found:
            return ""
        if not any(found):
            return f"Is made for {made_for}, and {_named(device)} does not say which Snapdragon it is"
        pair = " and ".join(f"{key} {text or 'none'}" for key, text in zip(_CHIP, wanted, strict=True))
        own = " and ".join(text or "none" for text in found)
        return f"Is made for {made_for}: {pair}; {_named(device)} has {own}"
    if target["arch"] == device.arch:
        return ""
    return f"Is made for {made_for}, and {_named(device)} is of another architecture"


def _has_cpu(device: Device) -> bool:
    """A processor, or a system on a chip, which has one."""
    return device.kind == "cpu" or device.arch in _CPUS or device.arch.startswith(_HEXAGON)


def _named(device: Device) -> str:
    return f"{device.name or device.id} ({device.arch})"


def _free(device: Device) -> int | None:
    """Bytes that may be used; None where nobody knows."""
    return device.memory_bytes or None if device.free_bytes is None else device.free_bytes
