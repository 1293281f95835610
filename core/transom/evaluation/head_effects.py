"""How much each KV head of a model must read: measured once, and kept as the `heads` of its sparsity policies.

One KV head at a time is made sparse while all others read every key, and the divergence of the logits from those of
dense attention is taken at the end of a few long passages, in exact arithmetic: rounding would hide the effect of one
head. In most models a few heads, those that find single tokens and copy what follows them, carry most of the
divergence: where one alone has more than a tenth of what all have together, on any of the passages, it stays dense. A
head that hardly matters anywhere reads less. Finer shares for each head were tried: they fit the passages they were
made from and did no better on others.

Knows sessions of the contract and nothing of any backend; it needs one that obeys a policy for each step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from transom.contract import State, Work
from transom.contract_optional import SparseSession
from transom.errors import OptionError
from transom.sparsity import DENSE, PRESETS, Sparsity

if TYPE_CHECKING:
    from transom.generation.model import Model
    from transom.sparsity import Heads

NEW = 128
"""Tokens at the end of each passage whose logits are compared: whole blocks of 64."""
MEASURED = 2.0
"""What 1 - coverage of `balanced` is multiplied by for the head that is measured: more than noise, less than ruin."""
DENSE_SHARE = 0.1
"""Of the divergence of all heads on a passage: a head with more stays dense."""
STANDS_OUT = 3.0
"""In a model of few heads it also has to have this many times the mean."""
LOOSE_SHARE = 0.15
"""Of the mean divergence of the heads that do not stay dense: one with less on every passage is loose."""
LOOSE = 4.0
"""What 1 - coverage is multiplied by for a loose head."""

Progress = Callable[[int, int], None]
Array = np.ndarray[Any, np.dtype[Any]]


class Measurements(Protocol):
    """Keeps what was measured, so that an interrupted calibration goes on where it was."""

    def read(self) -> dict[str, Any]:
        """JSON types, by name; empty where nothing was kept."""

    def write(self, values: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class Effect:
    """What a policy does to a model."""

    divergences: tuple[float, ...]
    """Of each passage: mean Kullback-Leibler divergence from dense attention over the compared tokens, nats."""
    density: float
    """Share of the keys that was read, by the heads that were made sparse."""

    @property
    def divergence(self) -> float:
        """The mean over the passages."""
        return sum(self.divergences) / len(self.divergences)


@dataclass(frozen=True)
class HeadCalibration:
    """What a calibration found."""

    heads: Heads
    before: Effect
    """All heads sparse, by `balanced` without calibration."""
    after: Effect
    """The same with these heads."""
    effects: tuple[tuple[Effect, ...], ...]
    """Of each layer and KV head, alone and at `MEASURED`."""
    seconds: float

    @property
    def dense_heads(self) -> list[tuple[int, int]]:
        """(layer, KV head) of those that stay dense."""
        return [(i, h) for i, layer in enumerate(self.heads) for h, m in enumerate(layer) if m == 0]

    @property
    def loose_heads(self) -> list[tuple[int, int]]:
        """(layer, KV head) of those that read less than the others."""
        return [(i, h) for i, layer in enumerate(self.heads) for h, m in enumerate(layer) if m > 1]

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return asdict(self) | {"dense_heads": self.dense_heads, "loose_heads": self.loose_heads}


def head_multipliers(effects: Sequence[Sequence[Effect]]) -> Heads:
    """A multiplier for each layer and KV head: 0 dense, `LOOSE`, or 1."""
    found = np.array([effect.divergences for layer in effects for effect in layer])  # [heads, passages]
    total = found.sum(0)
    share = max(DENSE_SHARE, STANDS_OUT / len(found))
    dense = (found > share * np.where(total > 0, total, np.inf)).any(-1)
    rest = found[~dense]
    mean = rest.mean(0) if len(rest) else total
    loose = ~dense & (found <= LOOSE_SHARE * mean).all(-1)
    numbers = iter(np.where(dense, 0.0, np.where(loose, LOOSE, 1.0)).tolist())
    return tuple(tuple(next(numbers) for _ in layer) for layer in effects)


# measuring ------------------------------------------------------------------------------------------------------------
def calibrate(
    model: Model,
    taken: Mapping[str, Sequence[int]],
    *,
    memory: Measurements | None = None,
    progress: Progress | None = None,
) -> HeadCalibration:
    """Measure a model's heads.

    Args:
        model: loaded with `sparsity="off"`, and in exact arithmetic.
        taken: token ids of each passage, all equally many: `passages`.
        memory: where measured heads are kept, so that an interrupted calibration goes on.
        progress: called with (heads measured, heads).

    Raises:
        OptionError: the model's backend obeys no policy for a single step.
        TransomError: as the model's steps do.
    """
    began = time.monotonic()
    decoder = model._loaded.decoder
    if decoder is None:
        raise OptionError("This model has no attention with a cache", "Calibrate a decoder")
    counts = [layer.kv_heads for layer in decoder.layers]
    kept = memory.read() if memory else {}
    with model._engine.exclusive() as session:
        if not isinstance(session, SparseSession):
            raise OptionError(
                f"The backend {model.report.backend} reads every key by one policy from loading on",
                "Calibrate on a backend that obeys a policy for each call, such as --backend reference",
            )
        measure = _Measure(session, [list(ids) for ids in taken.values()], counts)
        try:
            effects: list[tuple[Effect, ...]] = []
            done, total = 0, sum(counts)
            for layer, heads in enumerate(counts):
                row: list[Effect] = []
                for head in range(heads):
                    name = f"{layer}.{head}"
                    if name not in kept:
                        found = measure(_alone(counts, layer, head), (layer, head))
                        kept[name] = [*found.divergences, found.density]
                        if memory:
                            memory.write(kept)
                    *divergences, density = kept[name]
                    row.append(Effect(tuple(divergences), density))
                    done += 1
                    if progress:
                        progress(done, total)
                effects.append(tuple(row))
            heads_found = head_multipliers(effects)
            plain: Heads = tuple((1.0,) * n for n in counts)
            return HeadCalibration(
                heads_found, measure(plain), measure(heads_found), tuple(effects), time.monotonic() - began
            )
        finally:
            measure.free()


def _alone(counts: Sequence[int], layer: int, head: int) -> Heads:
    return tuple(tuple(MEASURED if (i, h) == (layer, head) else 0.0 for h in range(n)) for i, n in enumerate(counts))


class _Measure:
    """The passages up to their last tokens, read once by dense attention; each measurement reads on from there."""

    def __init__(self, session: SparseSession, taken: Sequence[Sequence[int]], counts: Sequence[int]) -> None:
        self._session, self._counts = session, counts
        self._states: list[State] = []
        self._last = [list(ids[-NEW:]) for ids in taken]
        for ids in taken:
            state = session.new_state()
            self._states.append(state)
            before = ids[:-NEW]
            most = session.limits.max_tokens
            for at in range(0, len(before), most):
                session.step([Work(state, before[at : at + most], "none", sparsity=DENSE)])
        exact, _ = self._run(DENSE)
        self._exact = [_log_softmax(rows) for rows in exact]

    def __call__(self, heads: Heads, only: tuple[int, int] | None = None) -> Effect:
        """`balanced` with these heads; the density is that of all heads, or of (layer, head) alone."""
        policy = Sparsity.from_dict({**PRESETS["balanced"].to_dict(), "heads": [list(layer) for layer in heads]})
        rows, (read, seen) = self._run(policy.to_string())
        found = [_divergence(exact, _log_softmax(r)) for exact, r in zip(self._exact, rows, strict=True)]
        if only is not None:
            read, seen = read[only], seen[only]
        return Effect(tuple(max(0.0, d) for d in found), float(read.sum() / seen.sum()))

    def free(self) -> None:
        for state in self._states:
            state.free()

    def _run(self, policy: str) -> tuple[list[Array], Array]:
        """Logits of the last tokens of each passage, and keys read and seen: float64 [2, layers, heads]."""
        found: list[Array] = []
        total: Array = np.zeros(())
        for state, ids in zip(self._states, self._last, strict=True):
            fork = state.fork(state.length)
            try:
                (rows,) = self._session.step([Work(fork, ids, "all", sparsity=policy)])
                found.append(np.asarray(rows))
                total = total + np.asarray(self._session.keys_read(fork))
            finally:
                fork.free()
        return found, total


def _log_softmax(rows: Array) -> Array:
    shifted = rows.astype(np.float32) - rows.max(-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def _divergence(exact: Array, other: Array) -> float:
    return float((np.exp(exact) * (exact - other)).sum(-1, dtype=np.float64).mean())
