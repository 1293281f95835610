"""`transom.explain` for a bundle: which devices its backends can open it on. No nodes are left to explain."""

from __future__ import annotations

from pathlib import Path

from transom.bundles.manifest import read_manifest
from transom.bundles.opening import require_backend
from transom.contract import Artifact, Refusal
from transom.loading.explanation import BackendAnswer, Explanation
from transom.loading.machine import Machine
from transom.preparation.plugin_calls import check_artifact


def explain_bundle(folder: Path, machine: Machine, *, device: str = "auto") -> Explanation:
    """Ask a bundle's backend about every device, from the bundle's manifest alone.

    Args:
        device: `"auto"` for all devices that are here, or the id of one.

    Raises:
        BundleError: the manifest is damaged, or of a newer version.
        SelectionError: the backend is not installed.
    """
    manifest = read_manifest(folder)
    wanted = {d.id: d for d in machine.devices if (d.kind != "remote" if device == "auto" else d.id == device)}
    answers: list[BackendAnswer] = []
    for variant in manifest.variants:
        require_backend(variant, folder, machine)
        artifact = Artifact({}, variant.requires, variant.notes)
        for name, answer in machine.answers:
            if name != variant.backend or answer.device_id not in wanted:
                continue
            if isinstance(answer, Refusal):
                answers.append(BackendAnswer(name, answer.device_id, answer))
                continue
            target = wanted[answer.device_id]
            verdict = check_artifact(machine.plugins.backends[name].backend, artifact, target)
            answers.append(BackendAnswer(name, target.id, answer, verdict=verdict))
    notes = [
        f"{variant.name}: {note}" if len(manifest.variants) > 1 else note
        for variant in manifest.variants
        for note in variant.notes
    ]
    return Explanation(f"{manifest.name} in the bundle {folder}", 0, tuple(answers), tuple(notes))
