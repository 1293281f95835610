"""Proving what was compiled for a device that is not here: on something here that can run it, an emulator say, its
logits are compared with the reference's, and too large a difference keeps it from being shipped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.bundles.opening import verdict_on
from transom.contract import Offer
from transom.errors import FidelityError
from transom.loading.loader import notes_of
from transom.selection import Candidate

if TYPE_CHECKING:
    from transom.loading.loader import Loader, Ready
    from transom.loading.machine import Machine
    from transom.preparation.cached_source import Compiled

ERRORS_FILE = "errors.json"
"""Of an artifact: a list of objects with `node` and `error` (relative), the worst first. Backends may write it."""
FINER = {"int4": "int8", "int8": "f16"}
"""What is more exact, by how backends name what they compute in."""
NAMED = 3
"""Products that a refusal names."""


def proved(
    loader: Loader, machine: Machine, candidate: Candidate, ready: Ready, max_kl: float | None
) -> Mapping[str, Any] | None:
    """What `Variant.fidelity` holds; None where nothing here can run it, or where it needs no proof: it runs here and
    the self-check has spoken, it is no decoder, or `verify` is off.

    Raises:
        FidelityError: the divergence is above the bound; names the worst products.
        EngineError: it cannot be run.
    """
    if loader.verify == "off" or ready.source.decoder is None:
        return None
    if candidate.offer.runs_here:
        if max_kl is not None and (kl := checked_kl(ready)) is not None:
            _require(candidate, ready, kl, max_kl, f"on {candidate.device.id}")
        return None
    found = _place(machine, candidate)
    if found is None:
        return None
    own = verdict_on(candidate.backend, ready.stored.artifact, machine, found.device).state in ("ok", "slower")
    if not own and not found.offer.by_name:
        return None  # a real device, but another one
    # What cannot be opened here, a chip's context with shared weights say, is compiled once more for what is here: the
    # same graphs and numbers.
    said = loader.prove(machine, candidate if own else found, found.device, remove=not own)
    again = "" if own else ", compiled for it once more"
    fidelity = {"where": f"{found.offer.why}, on {found.device.id}{again}", **said["fidelity"]}
    from transom.preparation.selfcheck import LIMITS  # imports NumPy

    limits = LIMITS[bool(ready.stored.origin.ingredients.get("exact", True))]
    _require(candidate, ready, fidelity["kl"], limits[0] if max_kl is None else max_kl, fidelity["where"])
    if max_kl is None or max_kl <= limits[0]:  # with a wider one they are asked for what a load would not believe
        _require_believable(candidate, ready, said["agreements"], limits, fidelity["where"])
    return fidelity


def checked_kl(ready: Ready) -> float | None:
    """Nats by which a decoder diverged in the self-check of this machine; None where there was none."""
    said = ready.verdict
    if ready.source.decoder is None or not isinstance(said, dict) or not said.get("checked"):
        return None
    return float(said["kl_mean"])


def _require(candidate: Candidate, ready: Ready, kl: float, bound: float, where: str) -> None:
    """Raise FidelityError where the divergence is above the bound, or no number."""
    if not kl <= bound:
        raise FidelityError(
            f"What {candidate.backend} compiled diverges by {kl:.3g} nats from the reference on the fixed prompt "
            f"({where}), and {bound:g} are allowed{_worst(ready.stored)}",
            f"{_finer(ready)}, give texts like those the model will read (calibration=…), or allow more with max_kl=…",
        )


def _require_believable(
    candidate: Candidate,
    ready: Ready,
    agreements: Sequence[tuple[float, float]],
    limits: tuple[float, float],
    where: str,
) -> None:
    """Raise FidelityError where the self-check of a load would not let it through."""
    for kl, correlation in agreements:
        if not (kl <= limits[0] and correlation >= limits[1]):
            raise FidelityError(
                f"What {candidate.backend} compiled would not be believed where it is loaded: on the fixed prompt it "
                f"diverges by {kl:.3g} nats with a correlation of {correlation:.3f} ({where}), and {limits[0]:g} nats "
                f"and {limits[1]:g} are allowed{_worst(ready.stored)}",
                f"{_finer(ready)}, or ship it all the same with a max_kl above {limits[0]:g}",
            )


def _finer(ready: Ready) -> str:
    """The option that makes it more exact."""
    said, _ = notes_of(ready.source, ready.stored)
    better = next((finer for name, finer in FINER.items() if said.startswith(name)), "")
    return f"Use precision={better!r}" if better else "Choose a precision with more bits"


def told(fidelity: Mapping[str, Any]) -> str:
    """For people."""
    return (
        f"mean KL {fidelity['kl']:.2g} nats, cosine {fidelity['cosine']:.5f}, same best token {fidelity['top1']:.0%} "
        f"of {fidelity['tokens']} positions ({fidelity['where']})"
    )


def _place(machine: Machine, candidate: Candidate) -> Candidate | None:
    """The first device of this machine that the backend itself offers to run on."""
    here = {device.id: device for device in machine.devices if device.kind != "remote"}
    for name, answer in machine.answers:
        if name != candidate.backend or not isinstance(answer, Offer) or not answer.runs_here:
            continue
        if answer.device_id in here:
            return Candidate(name, here[answer.device_id], answer)
    return None


def _worst(stored: Compiled) -> str:
    path = stored.artifact.files.get(ERRORS_FILE)
    if not isinstance(path, Path):
        return ""
    worst = [f"{e['node']} ({e['error']:.1%})" for e in json.loads(path.read_text(encoding="utf-8"))[:NAMED]]
    return f"; the worst products are {', '.join(worst)}" if worst else ""
