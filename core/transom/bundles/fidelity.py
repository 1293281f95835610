"""Measures the fidelity of a model that was compiled for a device that is not in this machine.

If something here can run it, such as an emulator, its logits are compared with the reference logits. If they differ too
much, the bundle is not written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from transom.authoring.opening import reading_artifact
from transom.contract import Offer
from transom.errors import FidelityError, option
from transom.hardware.probe_file import to_json
from transom.loading.attempts import Attempt
from transom.preparation.compiled import Allowed, CompiledModel, allowed, divergence, precision_and_notes
from transom.preparation.jobs import FIDELITY
from transom.preparation.plugin_calls import check_artifact
from transom.selection import Candidate
from transom.typed import from_json

if TYPE_CHECKING:
    from transom.loading.cached_models import CachedModels
    from transom.loading.compiled_models import Ready

ERRORS_FILE = "errors.json"
"""Optional file of an artifact, written by the backend: objects with `node` and relative `error`, largest first."""
MORE_EXACT = {"int4": "int8", "int8": "f16"}
"""Start of the reported compute precision -> a more exact precision."""
WORST_NAMED = 3
"""Number of matrix products that an error names."""


def measured_fidelity(
    models: CachedModels, attempt: Attempt, ready: Ready, max_kl: float | None
) -> Mapping[str, Any] | None:
    """The value of `Variant.fidelity`.

    None where nothing here can run the model, and where no comparison is needed: the model runs here and has passed the
    self-check, it is not a decoder, or `verify` is off.

    Raises:
        FidelityError: the divergence is above the bound; names the matrix products with the largest errors.
        EngineError: the model cannot be run.
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
    device = found.device
    own = check_artifact(attempt.plugin.backend, ready.compiled.artifact, device).state in ("ok", "slower")
    if not own and not found.offer.by_name:
        return None  # a real device, but not the target
    # Some artifacts cannot be opened here, such as a chip's context with shared weights. Then the same graphs with the
    # same quantized weights are compiled again for the device that is here.
    compiled_for = attempt if own else Attempt(attempt.machine, attempt.choice, found)
    measured = models.jobs.run(FIDELITY, compiled_for, on=to_json([device]), remove=not own)
    again = "" if own else ", compiled for it again"
    fidelity = {"where": f"{found.offer.why}, on {device.id}{again}", **measured["fidelity"]}
    limits = allowed(ready.compiled)
    _require_bound(attempt, ready, fidelity["kl"], limits.kl if max_kl is None else max_kl, fidelity["where"])
    if max_kl is None or max_kl <= limits.kl:  # with a wider bound the user accepts more than a load does
        _require_acceptable(attempt, ready, measured["agreements"], limits, fidelity["where"])
    return fidelity


def selfcheck_kl(ready: Ready) -> float | None:
    """The divergence in nats from the self-check on this machine; None without a check or for another graph."""
    return divergence(ready.source.decoder, ready.verdict)


def _require_bound(attempt: Attempt, ready: Ready, kl: float, bound: float, where: str) -> None:
    """Raise FidelityError if the divergence is above the bound or NaN."""
    if not kl <= bound:
        raise FidelityError(
            f"What {attempt.candidate.backend} compiled diverges by {kl:.3g} nats from the reference on the fixed "
            f"prompt ({where}), and {bound:g} are allowed{_worst_products(ready.compiled)}",
            f"{_more_exact(ready)}, give texts like those the model will read ({option('calibration')}), "
            "or allow more with "
            f"{option('max_kl')}",
        )


def _require_acceptable(
    attempt: Attempt,
    ready: Ready,
    agreements: Sequence[tuple[float, float]],
    limits: Allowed,
    where: str,
) -> None:
    """Raise FidelityError if the model would fail the self-check of a load."""
    for kl, correlation in agreements:
        if not limits.accepts(kl, correlation):
            raise FidelityError(
                f"What {attempt.candidate.backend} compiled would fail the self-check where it is loaded: on the fixed "
                f"prompt it diverges by {kl:.3g} nats with a correlation of {correlation:.3f} ({where}), and "
                f"{limits.kl:g} nats and {limits.correlation:g} are allowed{_worst_products(ready.compiled)}",
                f"{_more_exact(ready)}, or accept it with a max_kl above {limits.kl:g}",
            )


def _more_exact(ready: Ready) -> str:
    """Advice on a more exact precision."""
    precision, _ = precision_and_notes(ready.source.notes, ready.compiled)
    better = next((finer for name, finer in MORE_EXACT.items() if precision.startswith(name)), "")
    return f"Use {option('precision', better)}" if better else "Choose a precision with more bits"


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


class _Deviation(TypedDict, total=False):
    """The error of a quantized product, which backends state with other facts."""

    node: str
    error: float


def _worst_products(model: CompiledModel) -> str:
    path = model.artifact.files.get(ERRORS_FILE)
    if not isinstance(path, Path):
        return ""
    with reading_artifact():
        found = from_json(list[_Deviation], path.read_bytes())
    worst = [f"{e['node']} ({e['error']:.1%})" for e in found[:WORST_NAMED] if "node" in e and "error" in e]
    return f"; the worst products are {', '.join(worst)}" if worst else ""
