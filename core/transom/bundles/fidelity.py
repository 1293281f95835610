"""Proving what was compiled for a device that is not here: where something here can run it, such as an emulator, its
logits are compared with the reference's. If they differ too much, the bundle is not written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.bundles.bundle_models import verdict_on
from transom.contract import Offer
from transom.errors import FidelityError
from transom.hardware.probe_file import to_json
from transom.loading.attempts import Attempt
from transom.preparation.compiled import CompiledModel, is_exact, precision_and_notes
from transom.preparation.jobs import FIDELITY
from transom.selection import Candidate

if TYPE_CHECKING:
    from transom.loading.cached_models import CachedModels
    from transom.loading.compiled_models import Ready

ERRORS_FILE = "errors.json"
"""A file of an artifact that backends may write: a list of objects with `node` and `error` (relative), the largest
first."""
MORE_EXACT = {"int4": "int8", "int8": "f16"}
"""The more exact precision, by how backends name the one that they compute in."""
WORST_NAMED = 3
"""Products that a refusal names."""


def measured_fidelity(
    models: CachedModels, attempt: Attempt, ready: Ready, max_kl: float | None
) -> Mapping[str, Any] | None:
    """The value of `Variant.fidelity`. None where nothing here can run it, and where no proof is needed: it runs here
    and has passed the self-check, it is not a decoder, or `verify` is off.

    Raises:
        FidelityError: the divergence is above the bound; names the products with the largest errors.
        EngineError: it cannot be run.
    """
    if models.state.options.verify == "off" or ready.source.decoder is None:
        return None
    if attempt.runs_here:
        if max_kl is not None and (kl := selfcheck_kl(ready)) is not None:
            _require_bound(attempt, ready, kl, max_kl, f"on {attempt.device.id}")
        return None
    found = _candidate_here(attempt)
    if found is None:
        return None
    name, device = attempt.candidate.backend, found.device
    own = verdict_on(name, ready.compiled.artifact, attempt.machine.plugins, device).state in ("ok", "slower")
    if not own and not found.offer.by_name:
        return None  # a real device, but another one
    # Some artifacts cannot be opened here, such as a chip's context with shared weights. Then the same graphs and
    # numbers are compiled again for what is here.
    compiled_for = attempt if own else Attempt(attempt.machine, attempt.choice, found)
    shown = models.jobs.run(FIDELITY, compiled_for, on=to_json([device]), remove=not own)
    again = "" if own else ", compiled for it once more"
    fidelity = {"where": f"{found.offer.why}, on {device.id}{again}", **shown["fidelity"]}
    from transom.preparation.selfcheck import LIMITS  # imports NumPy

    limits = LIMITS[is_exact(ready.compiled)]
    _require_bound(attempt, ready, fidelity["kl"], limits[0] if max_kl is None else max_kl, fidelity["where"])
    if max_kl is None or max_kl <= limits[0]:  # a wider bound asks for what a load would not accept
        _require_acceptable(attempt, ready, shown["agreements"], limits, fidelity["where"])
    return fidelity


def selfcheck_kl(ready: Ready) -> float | None:
    """The divergence of a decoder in the self-check on this machine, nats; None where there was none."""
    said = ready.verdict
    if ready.source.decoder is None or not isinstance(said, dict) or not said.get("checked"):
        return None
    return float(said["kl_mean"])


def _require_bound(attempt: Attempt, ready: Ready, kl: float, bound: float, where: str) -> None:
    """Raise FidelityError where the divergence is above the bound, or no number."""
    if not kl <= bound:
        raise FidelityError(
            f"What {attempt.candidate.backend} compiled diverges by {kl:.3g} nats from the reference on the fixed "
            f"prompt ({where}), and {bound:g} are allowed{_worst_products(ready.compiled)}",
            f"{_more_exact(ready)}, give texts like those the model will read (calibration=…), or allow more with "
            "max_kl=…",
        )


def _require_acceptable(
    attempt: Attempt,
    ready: Ready,
    agreements: Sequence[tuple[float, float]],
    limits: tuple[float, float],
    where: str,
) -> None:
    """Raise FidelityError where the self-check of a load would not let it through."""
    for kl, correlation in agreements:
        if not (kl <= limits[0] and correlation >= limits[1]):
            raise FidelityError(
                f"What {attempt.candidate.backend} compiled would fail the self-check where it is loaded: on the fixed "
                f"prompt it diverges by {kl:.3g} nats with a correlation of {correlation:.3f} ({where}), and "
                f"{limits[0]:g} nats and {limits[1]:g} are allowed{_worst_products(ready.compiled)}",
                f"{_more_exact(ready)}, or accept it with a max_kl above {limits[0]:g}",
            )


def _more_exact(ready: Ready) -> str:
    """The option that makes it more exact."""
    precision, _ = precision_and_notes(ready.source.notes, ready.compiled)
    better = next((finer for name, finer in MORE_EXACT.items() if precision.startswith(name)), "")
    return f"Use precision={better!r}" if better else "Choose a precision with more bits"


def fidelity_text(fidelity: Mapping[str, Any]) -> str:
    """The numbers in one sentence."""
    return (
        f"mean KL {fidelity['kl']:.2g} nats, cosine {fidelity['cosine']:.5f}, same best token {fidelity['top1']:.0%} "
        f"of {fidelity['tokens']} positions ({fidelity['where']})"
    )


def _candidate_here(attempt: Attempt) -> Candidate | None:
    """The first device of this machine that the same backend offers to run on."""
    here = {device.id: device for device in attempt.machine.devices if device.kind != "remote"}
    for name, answer in attempt.machine.answers:
        if name != attempt.candidate.backend or not isinstance(answer, Offer) or not answer.runs_here:
            continue
        if answer.device_id in here:
            return Candidate(name, here[answer.device_id], answer)
    return None


def _worst_products(model: CompiledModel) -> str:
    path = model.artifact.files.get(ERRORS_FILE)
    if not isinstance(path, Path):
        return ""
    worst = [f"{e['node']} ({e['error']:.1%})" for e in json.loads(path.read_text(encoding="utf-8"))[:WORST_NAMED]]
    return f"; the worst products are {', '.join(worst)}" if worst else ""
