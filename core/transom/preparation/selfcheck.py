"""The self-check: a compiled model is used only after its logits for a fixed prompt agree with the reference logits.

Generation uses a session in more ways than that: see `session_uses`. For a graph that is not a decoder, the outputs for
fixed inputs are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from transom.contract import Session
from transom.errors import EngineError, SelfCheckFailed, option
from transom.preparation.agreement import DECODES, Agreement, agreements, compare_outputs
from transom.preparation.compiled import Allowed, Checked
from transom.preparation.plugin_calls import guarded
from transom.preparation.reference_outputs import plain_inputs
from transom.preparation.session_uses import (
    REUSED,
    Use,
    WrongResult,
    checked_rows,
    difference,
    distance,
    named_difference,
    tolerance,
    whole_prompt,
)
from transom.typed import typed

if TYPE_CHECKING:
    from transom.preparation.cached_source import CachedSource

Array = np.ndarray[Any, np.dtype[Any]]
T = TypeVar("T")

TOGETHER = "gives other numbers where forks, cuts and several sequences in a step meet"
"""What is said of a session that does each of these rightly alone."""


def judge(agreement: Agreement, *, allowed: Allowed, backend: str) -> None:
    """Raise SelfCheckFailed, with the numbers, if the agreement is outside of the limits."""
    if allowed.accepts(agreement.kl_mean, agreement.correlation_min):
        return
    raise SelfCheckFailed(
        f"The backend {backend} does not compute the outputs of this model: {agreement}, against the NumPy reference "
        f"({allowed})",
        f"Update the engine and its driver, choose another backend, or pass {option('verify', 'off')} to run it anyway",
    )


def decoder_logits(session: Session, expected: Array, ids: Sequence[int], *, allowed: Allowed, backend: str) -> Array:
    """The session's logits of the check prompt, float32 [positions, vocabulary], after every use of the session that
    generation makes has given the same numbers (`session_uses`).

    The logits themselves are not compared with the reference here, except to find out what is wrong.

    Args:
        expected: the reference's logits.

    Raises:
        SelfCheckFailed: a use gives other numbers; says which.
        EngineError: the session failed or returned rows of the wrong shape.
    """
    ids = list(ids[: session.limits.context])

    def accepted(rows: Array) -> bool:
        return all(allowed.accepts(a.kl_mean, a.correlation_min) for a in agreements(expected[: len(rows)], rows))

    def run() -> tuple[Array, str]:
        rows, uses = checked_rows(session, ids, backend)
        if not uses:
            return rows, ""
        most = tolerance(expected[: len(ids) - DECODES], rows[:-DECODES])
        decoded = [Use(at, rows[at]) for at in range(len(rows) - DECODES, len(rows))]
        apart = any(difference(use, expected, most) for use in decoded) or any(
            difference(use, rows, most) for use in uses
        )
        if not apart:
            return rows, ""
        together = accepted(rows)
        alone = whole_prompt(session, ids, backend)
        first, again = rows[:-DECODES], alone[:-DECODES]  # of the same tokens, before and after states were freed
        if max(map(distance, first, again)) > most:
            return alone, REUSED
        if not accepted(alone):
            return alone, ""
        most = tolerance(expected[: len(alone)], alone)
        if named := named_difference(session, ids, alone, most):
            return alone, named
        if any(difference(use, alone, most) for use in uses):
            return alone, TOGETHER
        return (alone, "") if together else (rows, TOGETHER)

    rows, wrong = guarded(backend, "running the check prompt", lambda: _contract_kept(backend, run))
    if wrong:
        raise SelfCheckFailed(
            f"The backend {backend} {wrong}",
            f"Update the engine and its driver, choose another backend, or pass {option('verify', 'off')} to run it "
            "anyway",
        )
    return rows


def _contract_kept(backend: str, run: Callable[[], T]) -> T:
    try:
        return run()
    except WrongResult as error:
        raise EngineError(
            f"The backend {backend} does not keep the contract: {error}",
            f"Choose another with {option('backend')}, or report it to the authors of {backend}",
        ) from error


def session_logits(session: Session, ids: Sequence[int], backend: str) -> Array:
    """The session's logits from a prefill and `DECODES` single-token steps; float32 [positions, vocabulary].

    The ids are truncated to the session's context. Static shapes are padded as the engine pads them (`scheduling.fit`).

    Raises:
        EngineError: the session failed or returned rows of the wrong shape.
    """
    ids = list(ids[: session.limits.context])
    return guarded(
        backend,
        "running the check prompt",
        lambda: _contract_kept(backend, lambda: whole_prompt(session, ids, backend)),
    )


def verdict(
    session: Session, wanted: Mapping[str, Array], source: CachedSource, *, backend: str, allowed: Allowed
) -> Checked:
    """Compare a session with the reference outputs. Returns the verdict to remember.

    Args:
        wanted: `ids` and `logits` of a decoder; of another graph its outputs, empty where the reference cannot run it.
        allowed: the limits, `compiled.allowed`.

    Raises:
        SelfCheckFailed: they disagree; contains the numbers.
        EngineError: the session failed.
    """
    if source.decoder is not None:
        got = decoder_logits(session, wanted["logits"], wanted["ids"].tolist(), allowed=allowed, backend=backend)
        expected = wanted["logits"][: len(got)]
        agreement, *others = guarded(backend, "checking logits", lambda: agreements(expected, got))
        for other in others:
            judge(other, allowed=allowed, backend=backend)
    elif any(a.dtype.kind == "f" and np.isfinite(a).any() for a in wanted.values()):
        inputs = plain_inputs(source.inputs)
        agreement = guarded(
            backend, "running on made-up inputs", lambda: compare_outputs(wanted, session.run(inputs))
        )  # fmt: skip
    elif wanted:
        return {
            "checked": False,
            "reason": "not possible: on made-up inputs the graph gives no finite number to compare",
        }
    else:
        return {"checked": False, "reason": "not possible: the reference cannot run this graph on made-up inputs"}
    judge(agreement, allowed=allowed, backend=backend)
    return typed(Checked, {"checked": True, **agreement.to_dict(), "text": str(agreement)})
