"""The self-check: a compiled model is used only after its logits for a fixed prompt agree with the reference logits.

For a graph that is not a decoder, the outputs for fixed inputs are compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from transom.contract import Session, State, Work
from transom.errors import EngineError, SelfCheckFailed, option
from transom.generation.scheduling import fit
from transom.preparation.agreement import DECODES, Agreement, agreements, compare_outputs
from transom.preparation.plugin_calls import guarded
from transom.preparation.reference_outputs import plain_inputs

if TYPE_CHECKING:
    from transom.preparation.cached_source import CachedSource

Array = np.ndarray[Any, np.dtype[Any]]

LIMITS = {True: (0.05, 0.99), False: (0.5, 0.9)}
"""Whether all claims are exact -> (largest mean divergence in nats, lowest correlation at any position).

On the models tried, bfloat16 arithmetic stays below 0.005 nats and above 0.999, and int8 weights with dynamic int8
activations stay below 0.02 nats; a wrong layer or a corrupt cache is above 1 nat or below 0.5. Approximate claims
(4-bit requantization, FP8, sparse attention) get the wider bound; their fidelity is measured elsewhere.
"""


def judge(agreement: Agreement, *, exact: bool, backend: str) -> None:
    """Raise SelfCheckFailed, with the numbers, if the agreement is outside of the limits."""
    kl, correlation = LIMITS[exact]
    if agreement.kl_mean <= kl and agreement.correlation_min >= correlation:
        return
    raise SelfCheckFailed(
        f"The backend {backend} does not compute the outputs of this model: {agreement}, against the NumPy reference "
        f"(allowed are {kl} nats and a correlation of {correlation})",
        f"Update the engine and its driver, choose another backend, or pass {option('verify', 'off')} to run it anyway",
    )


def session_logits(session: Session, ids: Sequence[int], backend: str) -> Array:
    """The session's logits from a prefill and `DECODES` single-token steps; float32 [positions, vocabulary].

    The ids are truncated to the session's context. Static shapes are padded as the engine pads them (`scheduling.fit`).

    Raises:
        EngineError: the session failed or returned rows of the wrong shape.
    """
    ids = list(ids[: session.limits.context])
    head = max(1, len(ids) - DECODES)

    def run() -> list[Array]:
        state = session.new_state()
        try:
            rows = feed(session, state, ids[:head])
            for token in ids[head:]:
                rows += feed(session, state, [token])
            return rows
        finally:
            state.free()

    rows = guarded(backend, "running the check prompt", run)
    if any(row.ndim != 2 or row.shape[1:] != rows[0].shape[1:] for row in rows):
        shapes = [row.shape for row in rows]
        raise EngineError(f"The backend {backend} returned logits of the shapes {shapes} on the check prompt")
    return np.concatenate(rows).astype(np.float32)


def feed(session: Session, state: State, tokens: Sequence[int]) -> list[Array]:
    """Append tokens to a state, in steps within the session's limits. Returns the logits of each step."""
    limits, left, rows = session.limits, list(tokens), []
    while left:
        fitted = fit(len(left), limits.max_tokens, limits.context - state.length, limits.token_classes)
        if fitted is None:
            raise ValueError(f"no step of its limits takes {len(left)} tokens after {state.length}")
        take, width = fitted
        part = left[:take] + left[take - 1 : take] * (width - take)
        results = session.step([Work(state, part, "all")])
        if len(results) != 1 or results[0] is None:
            raise ValueError(f"step() returned {len(results)} results for one sequence, or none")
        rows.append(np.array(results[0])[:take])
        if width > take:
            state.truncate(state.length - (width - take))
        left = left[take:]
    return rows


def verdict(
    session: Session, wanted: Mapping[str, Array], source: CachedSource, *, backend: str, exact: bool
) -> dict[str, Any]:
    """Compare a session with the reference outputs. Returns the verdict to remember, in JSON types.

    Args:
        wanted: `ids` and `logits` of a decoder; of another graph its outputs, empty where the reference cannot run it.
        exact: whether no claim of the backend is approximate.

    Raises:
        SelfCheckFailed: they disagree; contains the numbers.
        EngineError: the session failed.
    """
    if source.decoder is not None:
        got = session_logits(session, wanted["ids"].tolist(), backend)
        expected = wanted["logits"][: len(got)]
        agreement, *others = guarded(backend, "checking logits", lambda: agreements(expected, got))
        for other in others:
            judge(other, exact=exact, backend=backend)
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
    judge(agreement, exact=exact, backend=backend)
    return {"checked": True, **agreement.to_dict(), "text": str(agreement)}
