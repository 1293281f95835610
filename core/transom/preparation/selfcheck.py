"""No engine is believed until it has spoken: a fixed prompt through the session, held against the reference.

The golden logits are computed once for each model by the NumPy reference, which streams the weights layer by layer, and
kept in the cache. The comparison has two measures, because either alone can be fooled: the Kullback–Leibler
divergence misses garbage when the model's own distribution is nearly flat, and correlation misses a wrong
temperature.

A graph that is not a decoder gets fixed inputs made from their shapes, and its outputs are compared.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from transom.artifacts import artifact_key
from transom.contract import Session, State, Work
from transom.errors import EngineError, SelfCheckFailed, SourceError
from transom.generation.scheduling import fit
from transom.preparation.jobs import version
from transom.preparation.plugin_calls import guarded
from transom.signature import Decoder, cache_input_names

if TYPE_CHECKING:
    from transom.artifacts import Cache
    from transom.graph import Graph
    from transom.preparation.cached_source import CachedSource
    from transom.text import Tokenizer

Array = np.ndarray[Any, np.dtype[Any]]
InputSpecs = Mapping[str, tuple[str, tuple[int | str | None, ...]]]
"""Element type (as NumPy names it) and shape by input name."""

PROMPT = "The capital of France is Paris, and two plus two is four."
LONGEST = 32
"""Tokens of the check prompt, at most."""
DECODES = 3
"""The last tokens of the prompt go through one by one, so that decoding with a cache is checked too."""

LIMITS = {True: (0.05, 0.99), False: (0.5, 0.9)}
"""exact claims or not -> (largest mean divergence in nats, smallest correlation of any position).

bfloat16 arithmetic stays below 0.005 nats and above 0.999 on the models tried, int8 weights with dynamic int8
activations below 0.02; a wrong layer or a garbled cache is beyond 1 nat or below 0.5. Approximate claims (4-bit
re-rounding, FP8, sparse attention) get the wider bound; their fidelity is measured elsewhere.
"""
SAME = 1e-3
"""Root mean square difference of logits below which they count as equal: it changes no probability by 1 %."""


@dataclass(frozen=True)
class Agreement:
    """How far two sets of logits agree, over all positions."""

    positions: int
    kl_mean: float
    """Kullback–Leibler divergence of the engine from the reference, nats, mean over positions."""
    kl_max: float
    correlation_min: float
    """Pearson correlation of the logits, the worst position; 1 where they are equal (`SAME`)."""
    top1: float
    """Share of positions with the same most likely token."""
    max_abs: float
    """Largest difference of any logit."""

    def to_dict(self) -> dict[str, float]:
        return asdict(self)

    def __str__(self) -> str:
        if self.kl_mean == float("inf"):
            return "the engine's numbers are not finite"
        return (
            f"mean KL {self.kl_mean:.2g} nats, worst correlation {self.correlation_min:.5f}, same best token "
            f"{self.top1:.0%} of {self.positions} positions"
        )


def compare(expected: Array, got: Array) -> Agreement:
    """Compare logits [positions, vocabulary]. Values that are not finite give an infinite divergence.

    Raises ValueError for different shapes.
    """
    a, b = np.asarray(expected, np.float64), np.asarray(got, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"logits of shape {b.shape}, expected {a.shape}")
    top1 = float(np.mean(a.argmax(-1) == b.argmax(-1)))
    if not np.isfinite(b).all():
        return Agreement(len(a), float("inf"), float("inf"), -1.0, top1, float("inf"))
    log_p, log_q = _log_softmax(a), _log_softmax(b)
    kl = np.maximum((np.exp(log_p) * (log_p - log_q)).sum(-1), 0.0)
    correlation = _correlation(a, b)
    return Agreement(
        len(a), float(kl.mean()), float(kl.max()), float(correlation.min()), top1, float(np.abs(a - b).max())
    )


def agreements(golden: Array, got: Array) -> list[Agreement]:
    """What is judged of a check prompt's logits, as `compare` gives it: all positions, and then those of the tokens
    that were decoded, since an error of a few alone would drown in the mean of all."""
    found = [compare(golden, got)]
    if len(got) > DECODES:
        found.append(compare(golden[-DECODES:], got[-DECODES:]))
    return found


def cosine(a: Array, b: Array) -> float:
    """Of the rows of two sets of logits, their mean; 0 where one is not finite."""
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    found = float(((x * y).sum(-1) / np.where(norms == 0, 1.0, norms)).mean())
    return found if np.isfinite(found) else 0.0


def _correlation(a: Array, b: Array) -> Array:
    """Of each row. Rows without variance have none: there only the difference counts."""
    x, y = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    same = np.sqrt(np.square(x - y).mean(-1)) <= SAME
    norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    result: Array = np.where(same, 1.0, (x * y).sum(-1) / np.where(norms == 0, np.inf, norms))
    return result


def _log_softmax(x: Array) -> Array:
    x = x - x.max(-1, keepdims=True)
    result: Array = x - np.log(np.exp(x).sum(-1, keepdims=True))
    return result


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


# ------------------------------------------------------------------------------------------------------------- decoders


def check_prompt(decoder: Decoder, tokenizer: Tokenizer | None) -> list[int]:
    """The fixed prompt as token ids: text where there is a tokenizer, else ids spread over the vocabulary."""
    ids = tokenizer.encode(PROMPT) if tokenizer is not None else []
    ids = [i for i in ids if 0 <= i < decoder.vocabulary]
    if len(ids) < DECODES + 2:
        ids = [(i * 7919 + 13) % decoder.vocabulary for i in range(16)]
    return ids[: min(LONGEST, decoder.context)]


def golden_logits(graph: Graph, ids: Sequence[int], progress: Callable[[float], None] | None = None) -> Array:
    """The reference's logits for every position, float32 [positions, vocabulary].

    Raises:
        SourceError: the reference itself computes values that are not finite, so the weights are damaged.
    """
    from transom.reference.executor import Executor

    decoder = graph.decoder
    assert decoder is not None
    tokens = np.asarray(ids, np.int64)
    none = np.zeros(0, np.int64)
    inputs: dict[str, Array] = {
        "input_ids": tokens,
        "positions": np.arange(len(tokens)),
        "sequences": np.zeros(len(tokens), np.int64),
        "past_positions": none,
        "past_sequences": none,
        "logit_rows": np.arange(len(tokens)),
    }
    for i, layer in enumerate(decoder.layers):
        for name, width in zip(cache_input_names(i), (layer.head_dim, layer.value_dim), strict=True):
            inputs[name] = np.zeros((0, layer.kv_heads * width), np.float32)
    logits = np.asarray(Executor(graph).run(inputs, progress=progress)["logits"], np.float32)
    if not np.isfinite(logits).all():
        raise SourceError(
            "The model computes values that are not numbers: its weights hold NaN or infinity, or overflow",
            "Download or convert the checkpoint again",
        )
    return logits


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


# --------------------------------------------------------------------------------------------------------- other graphs


def plain_inputs(specs: InputSpecs) -> dict[str, Array]:
    """Fixed inputs of a graph without a cache: zeros and ones where whole numbers are wanted, else a normal spread.

    A dimension without a number gets 3, so that those which must be equal are.
    """
    rng = np.random.default_rng(7)
    inputs: dict[str, Array] = {}
    for name, (dtype, shape) in specs.items():
        sizes = [d if isinstance(d, int) else 3 for d in shape]
        kind = np.dtype(dtype)
        values = rng.standard_normal(sizes) if kind.kind == "f" else rng.integers(0, 2, sizes)
        inputs[name] = np.asarray(values).astype(kind)
    return inputs


def compare_outputs(expected: Mapping[str, Array], got: Mapping[str, Any]) -> Agreement:
    """Compare the outputs of a plain graph; floating-point ones count, each as one row.

    The divergence is the mean square difference, relative to the reference's own spread: what takes the place of nats.
    """
    errors, correlations, largest = [], [], 0.0
    for name, wanted in expected.items():
        if wanted.dtype.kind != "f" or wanted.size == 0:
            continue
        if name not in got or np.shape(got[name]) != wanted.shape:
            raise ValueError(f"the output {name} is missing or of the wrong shape")
        keep = np.isfinite(wanted)
        a, b = np.asarray(wanted, np.float64)[keep][None], np.asarray(got[name], np.float64)[keep][None]
        if not np.isfinite(b).all():
            return Agreement(1, float("inf"), float("inf"), -1.0, 0.0, float("inf"))
        if not a.size:
            continue
        errors.append(float(np.square(a - b).mean() / max(float(np.square(a).mean()), 1e-12)))
        correlations.append(float(_correlation(a, b).min()) if a.size > 2 else 1.0)
        largest = max(largest, float(np.abs(a - b).max()))
    if not errors:
        return Agreement(0, 0.0, 0.0, 1.0, 1.0, 0.0)
    return Agreement(len(errors), float(np.mean(errors)), max(errors), min(correlations), 1.0, largest)


# -------------------------------------------------------------------------------------------------------------- verdict


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


_GOLDEN = "golden.npz"


def _golden_key(source: CachedSource) -> str:
    parts = {"graph": source.graph_digest, "transom": version()}
    return artifact_key({**parts, "source": source.key} if source.foreign else parts)


def keep_golden(cache: Cache, source: CachedSource, answers: Mapping[str, Array]) -> None:
    """Keep the reference's answers for a source."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **{name: np.asarray(array) for name, array in answers.items()})
    cache.golden.write(_golden_key(source), {_GOLDEN: buffer.getvalue()})


def recall_golden(cache: Cache, source: CachedSource) -> dict[str, Array] | None:
    """The answers that `keep_golden` kept, or None."""
    entry = cache.golden.lookup(_golden_key(source))
    if entry is None:
        return None
    with np.load(io.BytesIO(entry.read(_GOLDEN)), allow_pickle=False) as stored:
        return dict(stored.items())
