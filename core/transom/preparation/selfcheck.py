"""The self-check: no compiled model is used before its logits for a fixed prompt agree with the reference's.

A graph that is not a decoder is compared by its outputs for fixed inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from transom.contract import Session, State, Work
from transom.errors import EngineError, SelfCheckFailed
from transom.generation.scheduling import fit
from transom.preparation.agreement import DECODES, Agreement, agreements, compare_outputs
from transom.preparation.plugin_calls import guarded
from transom.preparation.reference_outputs import plain_inputs

if TYPE_CHECKING:
    from transom.preparation.cached_source import CachedSource

Array = np.ndarray[Any, np.dtype[Any]]

LIMITS = {True: (0.05, 0.99), False: (0.5, 0.9)}
"""exact claims or not -> (largest mean divergence in nats, smallest correlation of any position).

bfloat16 arithmetic stays below 0.005 nats and above 0.999 on the models tried, int8 weights with dynamic int8
activations below 0.02; a wrong layer or a garbled cache is beyond 1 nat or below 0.5. Approximate claims (4-bit
re-rounding, FP8, sparse attention) get the wider bound; their fidelity is measured elsewhere.
"""


def judge(agreement: Agreement, *, exact: bool, backend: str) -> None:
    """Raise SelfCheckFailed, naming the numbers, when the agreement is outside the limits."""
    kl, correlation = LIMITS[exact]
    if agreement.kl_mean <= kl and agreement.correlation_min >= correlation:
        return
    raise SelfCheckFailed(
        f"The backend {backend} does not compute what this model means: {agreement}, against the NumPy reference "
        f"(allowed are {kl} nats and a correlation of {correlation})",
        "Update the engine and its driver, choose another backend, or pass verify='off' to run it anyway",
    )


def session_logits(session: Session, ids: Sequence[int], backend: str) -> Array:
    """The session's logits: a prefill of all but the last tokens, then decodes; float32 [positions, vocabulary].

    A session with a short context gets as many of the tokens as it holds; static shapes are filled up as the engine
    does it (`scheduling.fit`).

    Raises:
        EngineError: the session raised or returned rows of the wrong shape.
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
    """Append tokens to a state, in as many steps as the session's limits ask for; the logits of each step."""
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
    """Hold a session against the reference's answers; what to remember, in JSON types.

    Args:
        wanted: `ids` and `logits`; of a plain graph its outputs, empty where the reference cannot run it.
        exact: no claim of the backend is approximate.

    Raises:
        SelfCheckFailed: they disagree; names the numbers.
        EngineError: the session failed.
    """
    if source.decoder is not None:
        got = session_logits(session, wanted["ids"].tolist(), backend)
        golden = wanted["logits"][: len(got)]
        agreement, *others = guarded(backend, "checking logits", lambda: agreements(golden, got))
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
