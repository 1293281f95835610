"""Which variants of a bundle a device can run, decided from the manifest alone.

Nothing is opened and no SDK has to be installed. The device need not be this machine's: it may come from the catalogue,
or be described by an app on a phone. A backend can define the rule for its variants
(`transom.contract_optional.FittingBackend`). Without one, and for a backend that is not installed, the architecture
decides. The rules are few, so that programs in other languages can implement them (`docs/mobile-export.md`);
`examples/edge` has them in C++. They do not cover whether the runtime is installed and new enough: the backend checks
that when the bundle is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transom.bundles.manifest import COPY_AGAIN, BundleError, require_version
from transom.bundles.manifest_values import MALFORMED, count, text
from transom.contract import Device, Verdict
from transom.contract_optional import FittingBackend
from transom.errors import TransomError
from transom.plugins import Plugins, load_plugins
from transom.preparation.memory import size
from transom.preparation.plugin_calls import guarded
from transom.sources.resolve import BUNDLE_KEY


@dataclass(frozen=True)
class VariantVerdict:
    """The verdict on one variant."""

    name: str
    fits: bool
    reason: str
    """One sentence, human-readable."""
    context: int = 0
    """The longest context in the manifest whose memory fits. 0: none fits, or the graph has no context."""


def judge(manifest: Mapping[str, Any], device: Device, plugins: Plugins | None = None) -> list[VariantVerdict]:
    """The verdict on each variant, in the manifest's order. A runtime uses the first variant that fits.

    Args:
        manifest: the content of `manifest.json`.
        device: the device to run on. `free_bytes` limits the memory, or else `memory_bytes`; without either there is
            no limit.
        plugins: the backends that may have rules for their variants; None: the installed ones.

    Raises:
        BundleError: the manifest has a newer version, or is damaged.
    """
    try:
        require_version(manifest[BUNDLE_KEY], "The bundle")
        known = load_plugins() if plugins is None else plugins
        return [_verdict(variant, device, known) for variant in manifest["variants"]]
    except MALFORMED as error:
        raise BundleError("The manifest of the bundle is damaged", COPY_AGAIN) from error


def _verdict(variant: Mapping[str, Any], device: Device, plugins: Plugins) -> VariantVerdict:
    name = text(variant["name"])
    fit = _fit(variant, device, plugins)
    if fit.state != "ok":
        return VariantVerdict(name, False, fit.reason)
    at = {int(context): count(needed) for context, needed in variant["memory"].get("at", {}).items()}
    whole = count(variant["context"])
    free = _free(device)
    if not at or free is None:
        return VariantVerdict(name, True, fit.reason or f"Is made for {_named(device)}", whole)
    longest = max((context for context, needed in at.items() if needed <= free), default=0)
    needed = at[whole]
    if needed <= free:
        reason = f"Needs {size(needed)} with its context of {whole} tokens, and {size(free)} are free"
        return VariantVerdict(name, True, reason, whole)
    rest = f"{longest} tokens would fit" if longest else "no context fits"
    reason = f"Needs {size(needed)} with its context of {whole} tokens, and {size(free)} are free: {rest}"
    return VariantVerdict(name, False, reason, longest)


def _fit(variant: Mapping[str, Any], device: Device, plugins: Plugins) -> Verdict:
    """Whether a variant fits this hardware, memory aside. Raises the exceptions in `MALFORMED`."""
    backend, target = text(variant["backend"]["name"]), variant["target"]
    made_for = f"{text(target['name'] or target['id'])} ({text(target['arch'])})"
    for value in variant["requires"].values():
        text(value)
    found = plugins.backends.get(backend)
    if found is not None and isinstance(found.backend, FittingBackend):
        rule = found.backend
        try:
            return guarded(backend, "judging a variant", lambda: rule.fits(variant, device))
        except TransomError as error:
            return Verdict("never", error.cause)
    if target["arch"] == device.arch:
        return Verdict("ok")
    return Verdict("never", f"Is made for {made_for}, and {_named(device)} is of another architecture")


def _named(device: Device) -> str:
    return f"{device.name or device.id} ({device.arch})"


def _free(device: Device) -> int | None:
    """Bytes that may be used; None: not known."""
    return device.memory_bytes or None if device.free_bytes is None else device.free_bytes
