"""The jobs of the child process: functions of JSON types, run by `transom.preparation.entry`.

An engine that has never run here may abort, or execute an instruction that this machine lacks. The host therefore runs
these jobs in a child process and reads their results from the cache. Not imported on a warm load.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from transom.contract import Progress
from transom.hardware.probe_file import from_json
from transom.preparation import agreement, selfcheck
from transom.preparation.compiled import Checked, allowed
from transom.preparation.decode_speed import decode_rate
from transom.preparation.plugin_calls import guarded, open_session
from transom.preparation.stages import Preparation


def read(payload: Mapping[str, Any], progress: Progress) -> None:
    """Open the source and keep what the host needs of it."""
    Preparation(payload, progress).source()


def prepare(payload: Mapping[str, Any], progress: Progress, reference: Future[Any] | None = None) -> dict[str, Any]:
    """Read, compile and check, so that the host can open the artifact. Skips steps whose result the cache has.

    Args:
        reference: a process that computes the reference outputs in parallel.

    Returns:
        `seconds` of each stage; `kept`, whether the cache could keep the artifact; the `verdict`, which a full disk may
        keep out of the cache; and the cache's `warnings`.
    """
    return _prepared(Preparation(payload, progress, reference))


def recheck(payload: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """As `prepare`, but check an artifact that has passed before again. If it fails, its verdict is removed."""
    return _prepared(Preparation(payload, progress), again=True)


def _prepared(preparation: Preparation, *, again: bool = False) -> dict[str, Any]:
    with preparation.verified_artifact(again=again) as stored:
        return {
            "seconds": preparation.seconds,
            "kept": not stored.temporary,
            "verdict": stored.verdict(preparation.job.runtime_identity, Checked),
            "warnings": preparation.cache.warnings,
        }


def reference_outputs(payload: Mapping[str, Any], progress: Progress) -> None:
    """Compute the reference outputs for the check prompt, unless the cache has them."""
    Preparation(payload, progress).reference_outputs()


def fidelity(payload: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Run an artifact for another device on a device of this machine, such as an emulator, and compare it with the
    reference.

    Args:
        payload: the job, with the device that it is compiled for; `on`, the device of this machine; `remove`, whether
            to delete the artifact afterwards, because it was compiled for this comparison alone.

    Returns:
        `fidelity`, which is `Variant.fidelity` without `where`; and `agreements`, pairs of mean divergence and lowest
        correlation: over all positions, and over those that the self-check judges separately.

    Raises:
        EngineError: the backend cannot open or run it there.
        SelfCheckFailed: its logits are right, but what else generation asks for is not.
    """
    arguments = dict(payload)
    on, remove = from_json(arguments.pop("on"))[0], arguments.pop("remove")
    preparation = Preparation({**arguments, "runs": False}, progress)  # the caller judges the logits
    with preparation.verified_artifact() as stored:
        wanted = preparation.reference_outputs()
        progress("compare", None)
        backend = preparation.plugin.backend
        session = open_session(backend, stored, on, {**preparation.options(), "threads": None})
        try:
            got = selfcheck.decoder_logits(
                session,
                wanted["logits"],
                wanted["ids"].tolist(),
                allowed=allowed(stored),
                backend=backend.name,
            )
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
    """Prepare and load, and time a short decode. Returns tokens per second."""
    preparation = Preparation(payload, progress)
    with preparation.verified_artifact() as stored:
        session = preparation.load(stored)
        try:
            progress("measure", None)
            ids = preparation.prompt()
            return guarded(preparation.job.backend, "decoding", lambda: decode_rate(session, ids))
        finally:
            session.close()
