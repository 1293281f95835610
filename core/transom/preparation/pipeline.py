"""The jobs of the child process: functions of JSON types, run by `transom.preparation.entry`.

An engine that has never run here may abort, or execute an instruction that this machine lacks. The host therefore runs
these jobs in a child process; their results reach it through the cache. Not imported on a warm load.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from transom.contract import Progress
from transom.hardware.probe_file import from_json
from transom.preparation import agreement, selfcheck
from transom.preparation.decode_speed import decode_rate
from transom.preparation.plugin_calls import guarded, open_session
from transom.preparation.stages import Preparation


def read(payload: Mapping[str, Any], progress: Progress) -> None:
    """Open the source and keep what the host needs of it."""
    Preparation(payload, progress).source()


def prepare(payload: Mapping[str, Any], progress: Progress, reference: Future[Any] | None = None) -> dict[str, Any]:
    """Read, compile and check, so that the host can open the artifact. Skips what is done already.

    Args:
        reference: a process that computes the reference outputs meanwhile.

    Returns `seconds` of each stage; whether the cache `kept` the artifact, so that the host can find it; the `verdict`,
    which a full disk may have kept from the cache; and the cache's `warnings`.
    """
    return _prepared(Preparation(payload, progress, reference))


def recheck(payload: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """As `prepare`, but checks the artifact again even if it has passed before. If it fails, its verdict is removed."""
    return _prepared(Preparation(payload, progress), again=True)


def _prepared(preparation: Preparation, *, again: bool = False) -> dict[str, Any]:
    with preparation.verified(again=again) as stored:
        return {
            "seconds": preparation.seconds,
            "kept": not stored.temporary,
            "verdict": stored.verdict(preparation.job.place),
            "warnings": preparation.cache.warnings,
        }


def golden(payload: Mapping[str, Any], progress: Progress) -> None:
    """Compute the reference outputs for the check prompt, where the cache does not have them."""
    Preparation(payload, progress).reference_outputs()


def prove(payload: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Run what was compiled for another device on a device of this machine, such as an emulator, and compare it with
    the reference.

    Args:
        payload: the job, with the device that it is compiled for; `on`: the device of this machine; `remove`: whether
            to delete the artifact afterwards, because it was compiled for this comparison alone.

    Returns `fidelity`, which is `Variant.fidelity` without `where`; and `agreements`, pairs of the mean divergence and
    the least correlation: over all positions, and over those that the self-check judges separately.

    Raises:
        EngineError: it cannot be opened there, or fails.
    """
    arguments = dict(payload)
    on, remove = from_json(arguments.pop("on"))[0], arguments.pop("remove")
    preparation = Preparation({**arguments, "runs": False}, progress)  # nothing is refused here: the caller judges
    with preparation.verified() as stored:
        wanted = preparation.reference_outputs()
        progress("prove", None)
        backend = preparation.plugin.backend
        session = open_session(backend, stored, on, {**preparation.options(), "threads": None})
        try:
            got = selfcheck.session_logits(session, wanted["ids"].tolist(), backend.name)
        finally:
            session.close()
        if remove:
            stored.remove()
        reference = wanted["logits"][: len(got)]
        found = guarded(backend.name, "checking logits", lambda: agreement.agreements(reference, got))
        whole = found[0]
        return {
            "fidelity": {
                "tokens": len(got),
                "kl": whole.kl_mean,
                "top1": whole.top1,
                "cosine": agreement.cosine(reference, got),
            },
            "agreements": [[one.kl_mean, one.correlation_min] for one in found],
        }


def measure(payload: Mapping[str, Any], progress: Progress) -> float:
    """Prepare, load, and time a short decode: tokens per second."""
    preparation = Preparation(payload, progress)
    with preparation.verified() as stored:
        session = preparation.load(stored)
        try:
            progress("measure", None)
            ids = preparation.prompt()
            return guarded(preparation.job.backend, "decoding", lambda: decode_rate(session, ids))
        finally:
            session.close()
