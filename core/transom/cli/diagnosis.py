"""The results of `transom doctor` as data: devices, trials, what is broken or missing, and the fixes."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.contract import Device, Offer, Refusal
from transom.hardware.probe_file import to_json

if TYPE_CHECKING:
    from transom.contract import Progress
    from transom.plugins import PluginFailure

PATIENCE = 180.0
"""Timeout of one trial, in seconds."""
EXTRAS: Mapping[str, tuple[str, str]] = {
    "openvino": ("openvino", "x86-64 CPUs"),
    "chat": ("prompt_toolkit", "history and multi-line input in transom chat"),
    "guided": ("llguidance", "answers that follow a JSON schema, a regular expression or a grammar"),
    "torch": ("torch", "models that are torch modules"),
    "families": ("mobius", "architectures that Transom does not build itself"),
    "verify": ("transformers", "transom verify"),
}
"""Extra -> (module that it installs, purpose)."""
PACKAGES = (
    *("transom", "numpy", "onnx", "onnx-ir", "tokenizers", "gguf", "safetensors", "jinja2", "click", "rich", "pluggy"),
    *("openvino", "prompt-toolkit", "llguidance", "torch", "transformers", "mobius-onnx", "onnxruntime"),
)


@dataclass(frozen=True)
class Trial:
    """The result of running a tiny model on one device with one backend."""

    backend: str
    device: str
    outcome: str
    """`"works"`, `"fails"`, or `"not tried"`."""
    says: str
    """The reason of the backend's offer, or the cause of the failure."""
    fix: str = ""
    seconds: float = 0.0
    details: tuple[str, ...] = ()


@dataclass(frozen=True)
class Diagnosis:
    """Everything needed for a support request."""

    devices: tuple[Device, ...]
    source: str
    """`"this machine"`, or the probe file."""
    notes: tuple[str, ...]
    trials: tuple[Trial, ...]
    refusals: tuple[tuple[str, Refusal], ...]
    failures: tuple[PluginFailure, ...]
    missing: Mapping[str, str]
    """Extra that is not installed -> its purpose."""
    cache: Mapping[str, Any]
    system: Mapping[str, str]
    packages: Mapping[str, str]
    environment: Mapping[str, str]
    """Variables that begin with TRANSOM_."""

    @property
    def works(self) -> bool:
        """Whether any model can run; if nothing was tried, whether any backend made an offer."""
        return any(trial.outcome in ("works", "not tried") for trial in self.trials)

    def fixes(self) -> list[str]:
        """The fixes, most important first and without duplicates; empty when nothing is wrong.

        A backend that refuses a device is nothing to fix where another one runs it.
        """
        served = {t.device for t in self.trials if t.outcome != "fails" and t.backend != "reference"}
        found = [f.fix for f in self.failures]
        found += [t.fix for t in self.trials if t.outcome == "fails"]
        found += [r.fix for _, r in self.refusals if r.code != "wrong_device" and r.device_id not in served]
        found.append(str(self.cache.get("fix", "")))
        if not served and "openvino" in self.missing:
            found.append("pip install 'transom[openvino]'")
        return [fix for fix in dict.fromkeys(found) if fix]

    def to_dict(self) -> dict[str, Any]:
        """A probe file with the other results beside the devices."""
        return {
            **to_json(self.devices),
            "source": self.source,
            "notes": list(self.notes),
            "works": self.works,
            "fixes": self.fixes(),
            "trials": [asdict(t) for t in self.trials],
            "refusals": [{"backend": name, **asdict(r)} for name, r in self.refusals],
            "failures": [asdict(f) for f in self.failures],
            "missing_extras": dict(self.missing),
            "cache": dict(self.cache),
            "system": dict(self.system),
            "packages": dict(self.packages),
            "environment": dict(self.environment),
        }


def diagnose(probe_file: Path | None = None, progress: Progress | None = None) -> Diagnosis:
    """Collect everything, and try a tiny model on each device with each backend that makes an offer for it.

    Args:
        probe_file: read the devices from this file. They are not in this machine, so nothing is tried on them.
    """
    from transom.loading.machine import survey
    from transom.preparation.plugin_operators import register_operators

    machine = survey(probe_file)
    register_operators(machine.plugins)  # may add failures of plugins
    here = {d.id: d for d in machine.devices if d.kind != "remote"}
    answers = [(name, answer) for name, answer in machine.answers if answer.device_id in here]
    tried = machine.found.source == "this machine"
    trials = [
        _try(name, here[answer.device_id], answer, progress)
        if tried
        else Trial(name, answer.device_id, "not tried", answer.why)
        for name, answer in answers
        if isinstance(answer, Offer) and answer.runs_here and not answer.by_name
    ]
    return Diagnosis(
        devices=tuple(here.values()),
        source=machine.found.source,
        notes=machine.found.notes,
        trials=tuple(trials),
        refusals=tuple((name, answer) for name, answer in answers if isinstance(answer, Refusal)),
        failures=machine.failures,
        missing={e: what for e, (module, what) in EXTRAS.items() if importlib.util.find_spec(module) is None},
        cache=_cache(),
        system=_system(),
        packages=package_versions(),
        environment={k: v for k, v in sorted(os.environ.items()) if k.startswith("TRANSOM_")},
    )


def _try(backend: str, device: Device, offer: Offer, progress: Progress | None) -> Trial:
    from transom.errors import TransomError
    from transom.preparation.child import run_in_child

    with tempfile.TemporaryDirectory(prefix="transom-doctor-", ignore_cleanup_errors=True) as folder:
        payload = {"backend": backend, "device": to_json([device]), "folder": folder}
        result = run_in_child("transom.cli.trying:try_backend", payload, timeout=PATIENCE, progress=progress)
    if result.failure is None:
        parts = ", ".join(f"{stage} {s:.2f}" for stage, s in result.value["seconds"].items() if s >= 0.005)
        details = (f"seconds: {parts}", result.value["agreement"], *result.value["notes"])
        return Trial(backend, device.id, "works", offer.why, seconds=result.seconds, details=details)
    error = result.failure.to_exception(f"A tiny model for {backend} on {device.id}")
    cause, fix = str(error), ""
    more: tuple[str, ...] = ()
    if isinstance(error, TransomError):
        cause, fix, more = error.cause, error.fix, error.details
    fix = fix or f"Choose another backend with --backend, or report it to the authors of {backend}"
    return Trial(backend, device.id, "fails", cause, fix, result.seconds, more)


def _cache() -> dict[str, Any]:
    """Path of the cache, whether it can be written, and its size."""
    from transom.artifacts import Cache
    from transom.errors import TransomError

    try:
        cache = Cache.default()
    except TransomError as e:
        return {"problem": e.cause, "fix": e.fix}
    found: dict[str, Any] = {"root": str(cache.root)}
    try:
        cache.require_writable()
    except TransomError as e:
        found |= {"writable": False, "problem": e.cause, "fix": e.fix}
    else:
        found["writable"] = True
    stats = cache.stats()
    return found | {"bytes": stats.bytes, "limit_bytes": stats.limit_bytes, "free_bytes": stats.free_bytes}


def _system() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "machine": platform.machine(),
    }


def package_versions() -> dict[str, str]:
    """Versions of the relevant packages that are installed."""
    return {name: version for name in PACKAGES if (version := _version(name))}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
