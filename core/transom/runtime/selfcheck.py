"""No engine is believed until it has spoken: a fixed prompt through the session, held against the reference.

The golden logits are computed once for each model by the NumPy reference, which streams the weights layer by layer, and
kept in the cache. The comparison has two measures, because either alone can be fooled: the Kullback–Leibler
divergence misses garbage when the model's own distribution is nearly flat, and correlation misses a wrong
temperature.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from transom.contract import Session, Work
from transom.errors import EngineError, SelfCheckFailed, SourceError
from transom.signature import Decoder

if TYPE_CHECKING:
    from transom.graph import Graph
    from transom.text import Tokenizer

Array = np.ndarray[Any, np.dtype[Any]]

PROMPT = "The capital of France is Paris, and two plus two is four."
DECODES = 3
"""The last tokens of the prompt go through one by one, so that decoding with a cache is checked too."""

LIMITS = {True: (0.05, 0.99), False: (0.5, 0.9)}
"""exact claims or not -> (largest mean divergence in nats, smallest correlation of any position).

bfloat16 arithmetic stays below 0.005 nats and above 0.999 on the models tried, int8 weights with dynamic int8
activations below 0.02; a wrong layer or a garbled cache is beyond 1 nat or below 0.5. Approximate claims (4-bit
re-rounding, FP8, sparse attention) get the wider bound; their fidelity is measured elsewhere.
"""


@dataclass(frozen=True)
class Agreement:
    """How far two sets of logits agree, over all positions."""

    positions: int
    kl_mean: float
    """Kullback–Leibler divergence of the reference from the engine, nats, mean over positions."""
    kl_max: float
    correlation_min: float
    """Pearson correlation of the logits, the worst position."""
    top1: float
    """Share of positions with the same most likely token."""
    max_abs: float
    """Largest difference of any logit."""

    def to_dict(self) -> dict[str, float]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"mean KL {self.kl_mean:.2g} nats, worst correlation {self.correlation_min:.5f}, same best token "
            f"{self.top1:.0%} of {self.positions} positions"
        )


def compare(expected: Array, got: Array) -> Agreement:
    """Compare logits [positions, vocabulary]. Values that are not finite give an infinite divergence."""
    a, b = np.asarray(expected, np.float64), np.asarray(got, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"logits of shape {b.shape}, expected {a.shape}")
    top1 = float(np.mean(a.argmax(-1) == b.argmax(-1)))
    if not np.isfinite(b).all():
        return Agreement(len(a), float("inf"), float("inf"), -1.0, top1, float("inf"))
    log_p, log_q = _log_softmax(a), _log_softmax(b)
    kl = np.maximum((np.exp(log_p) * (log_p - log_q)).sum(-1), 0.0)
    x, y = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    flat = norms == 0
    correlation = np.where(flat, np.linalg.norm(x - y, axis=-1) == 0, (x * y).sum(-1) / np.where(flat, 1, norms))
    return Agreement(
        len(a), float(kl.mean()), float(kl.max()), float(correlation.min()), top1, float(np.abs(a - b).max())
    )


def _log_softmax(x: Array) -> Array:
    x = x - x.max(-1, keepdims=True)
    result: Array = x - np.log(np.exp(x).sum(-1, keepdims=True))
    return result


def check_prompt(decoder: Decoder, tokenizer: Tokenizer | None) -> list[int]:
    """The fixed prompt as token ids: text where there is a tokenizer, else ids spread over the vocabulary."""
    ids = tokenizer.encode(PROMPT) if tokenizer is not None else []
    ids = [i for i in ids if 0 <= i < decoder.vocabulary]
    if len(ids) < DECODES + 2:
        ids = [(i * 7919 + 13) % decoder.vocabulary for i in range(16)]
    return ids[: min(32, decoder.context)]


def golden_logits(graph: Graph, ids: Sequence[int], progress: Callable[[float], None] | None = None) -> Array:
    """The reference's logits for every position, float32 [positions, vocabulary].

    Raises:
        SourceError: the reference itself computes values that are not finite, so the weights are damaged.
    """
    from transom.reference.executor import Executor
    from transom.signature import cache_input_names

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
            "the model computes values that are not numbers: its weights hold NaN or infinity, or overflow",
            "Download or convert the checkpoint again",
        )
    return logits


def session_logits(session: Session, ids: Sequence[int]) -> Array:
    """The session's logits for the same positions: a prefill of all but the last tokens, then decodes.

    Raises:
        EngineError: the session raised or returned rows of the wrong shape.
    """
    head = len(ids) - DECODES
    state = session.new_state()
    try:
        rows = [np.asarray(_first(session.step([Work(state, list(ids[:head]), "all")])))]
        rows += [np.asarray(_first(session.step([Work(state, [i], "last")])))[None] for i in ids[head:]]
    except Exception as e:  # somebody else's engine: whatever it raises is the verdict
        raise EngineError(f"the engine failed on the check prompt: {type(e).__name__}: {e}") from e
    finally:
        state.free()
    if any(r.ndim != 2 for r in rows):
        raise EngineError(f"the engine returned logits of shapes {[r.shape for r in rows]} on the check prompt")
    return np.concatenate(rows).astype(np.float32)


def _first(results: Sequence[Any]) -> Any:
    if len(results) != 1 or results[0] is None:
        raise ValueError(f"step() returned {len(results)} results for one sequence")
    return results[0]


def judge(agreement: Agreement, *, exact: bool, backend: str) -> None:
    """Raise SelfCheckFailed, naming the numbers, when the agreement is outside the limits."""
    kl, correlation = LIMITS[exact]
    if agreement.kl_mean <= kl and agreement.correlation_min >= correlation:
        return
    raise SelfCheckFailed(
        f"{backend} does not compute what this model means: {agreement} against the NumPy reference "
        f"(allowed: {kl} nats and {correlation})",
        "Update the engine and its driver, choose another backend, or pass verify='off' to run it anyway",
    )


def pack(ids: Sequence[int], logits: Array) -> bytes:
    """Golden logits as bytes for the cache."""
    buffer = io.BytesIO()
    np.savez(buffer, ids=np.asarray(ids, np.int64), logits=logits.astype(np.float32))
    return buffer.getvalue()


def unpack(data: bytes) -> tuple[list[int], Array]:
    with np.load(io.BytesIO(data), allow_pickle=False) as stored:
        return stored["ids"].tolist(), stored["logits"]
