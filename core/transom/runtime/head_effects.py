"""How much each KV head of a model must read: measured once, and kept as the `heads` of its sparsity policies.

One KV head at a time is made sparse while all others read every key, and the divergence of the logits from those of
dense attention is taken at the end of a few long passages, in exact arithmetic: rounding would hide the effect of one
head. Two measurements give a curve for each head, powers of d = 1 - coverage: divergence that grows with d, and a share
of the keys that falls. Then d is shared out between the heads so that all together read as much as they would by one
coverage for all, and the sum of their divergences is the least (Lagrange: the same exchange rate for every head).

Knows sessions of the contract and nothing of any backend; it needs one that obeys a policy for each step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from transom.contract import SparseSession, State, Work
from transom.errors import OptionError
from transom.sparsity import DENSE, PRESETS, Sparsity

if TYPE_CHECKING:
    from transom.runtime.model import Model
    from transom.sparsity import Heads

NEW = 192
"""Tokens at the end of each passage whose logits are compared: whole blocks of 64."""
MEASURED = (1.0, 4.0)
"""What 1 - coverage of `balanced` is multiplied by for the head that is measured."""
MULTIPLIERS = (0.15, 0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)
"""What a head may be given, besides 0: dense."""
MOSTLY = 0.6
"""A block that would read more than this reads everything."""
TINY = 1e-7
"""A divergence that is as good as none."""

Progress = Callable[[int, int], None]
Array = np.ndarray[Any, np.dtype[Any]]


class Memory(Protocol):
    """Keeps what was measured, so that an interrupted calibration goes on where it was."""

    def read(self) -> dict[str, Any]:
        """JSON types, by name; empty where nothing was kept."""

    def write(self, values: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class Effect:
    """What a policy does to a model."""

    divergence: float
    """Mean Kullback-Leibler divergence from dense attention, nats, over the compared tokens of all passages."""
    density: float
    """Share of the keys that was read, by the heads that were made sparse."""


@dataclass(frozen=True)
class Calibrated:
    """What a calibration found."""

    heads: Heads
    before: Effect
    """All heads sparse, by `balanced` without calibration."""
    after: Effect
    """The same with these heads."""
    effects: tuple[tuple[tuple[Effect, ...], ...], ...]
    """Of each layer and KV head alone, for each of `MEASURED`."""
    seconds: float

    @property
    def dense_heads(self) -> list[tuple[int, int]]:
        """(layer, KV head) of those that stay dense."""
        return [(i, h) for i, layer in enumerate(self.heads) for h, m in enumerate(layer) if m == 0]

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return asdict(self) | {"dense_heads": self.dense_heads}


# sharing out ----------------------------------------------------------------------------------------------------------
def share_out(effects: Sequence[Sequence[Sequence[Effect]]]) -> Heads:
    """Multipliers for each layer and KV head, from what was measured at each of `MEASURED`."""
    flat = [head for layer in effects for head in layer]
    curves = [_curve(head) for head in flat]
    allowed = sum(head[0].density for head in flat)

    def chosen(price: float) -> list[int]:
        return [int(np.argmin(divergence + price * density)) for divergence, density in curves]

    def reading(choice: list[int]) -> float:
        return sum(float(density[i]) for i, (_, density) in zip(choice, curves, strict=True))

    low, high = 1e-12, 1e3  # prices of reading: the lower, the more is read
    for _ in range(80):
        middle = math.sqrt(low * high)
        if reading(chosen(middle)) > allowed:
            low = middle
        else:
            high = middle
    options = (0.0, *MULTIPLIERS)
    numbers = iter([options[i] for i in chosen(high)])
    return tuple(tuple(next(numbers) for _ in layer) for layer in effects)


def _curve(head: Sequence[Effect]) -> tuple[Array, Array]:
    """(divergence, density) for dense and for each of `MULTIPLIERS`: float64 [1 + multipliers]."""
    first, second = head
    span = math.log(MEASURED[1] / MEASURED[0])
    near, far = max(first.divergence, TINY), max(second.divergence, TINY)
    growth = min(max(math.log(far / near) / span, 0.2), 3.0)
    fall = min(max(math.log(first.density / second.density) / span, 0.0), 1.0)
    m = np.array(MULTIPLIERS) / MEASURED[0]
    divergence = near * m**growth
    density = np.minimum(first.density * m**-fall, 1.0)
    if first.density > MOSTLY:  # it was read whole, and says nothing about less: start from the other one
        divergence = far * (np.array(MULTIPLIERS) / MEASURED[1]) ** growth
        density = np.where(np.array(MULTIPLIERS) < MEASURED[1], 1.0, second.density)
    return np.array([0.0, *divergence]), np.array([1.0, *density])


# measuring ------------------------------------------------------------------------------------------------------------
def calibrate(
    model: Model, taken: Mapping[str, Sequence[int]], *, memory: Memory | None = None, progress: Progress | None = None
) -> Calibrated:
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
            effects: list[tuple[tuple[Effect, ...], ...]] = []
            done, total = 0, sum(counts)
            for layer, heads in enumerate(counts):
                row: list[tuple[Effect, ...]] = []
                for head in range(heads):
                    name = f"{layer}.{head}"
                    if name not in kept:
                        found = [measure(_alone(counts, layer, head, m), (layer, head)) for m in MEASURED]
                        kept[name] = [[e.divergence, e.density] for e in found]
                        if memory:
                            memory.write(kept)
                    row.append(tuple(Effect(*numbers) for numbers in kept[name]))
                    done += 1
                    if progress:
                        progress(done, total)
                effects.append(tuple(row))
            heads_found = share_out(effects)
            plain: Heads = tuple((1.0,) * n for n in counts)
            return Calibrated(
                heads_found, measure(plain), measure(heads_found), tuple(effects), time.monotonic() - began
            )
        finally:
            measure.free()


def _alone(counts: Sequence[int], layer: int, head: int, multiplier: float) -> Heads:
    return tuple(tuple(multiplier if (i, h) == (layer, head) else 0.0 for h in range(n)) for i, n in enumerate(counts))


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
        divergences = [_divergence(exact, _log_softmax(r)) for exact, r in zip(self._exact, rows, strict=True)]
        if only is not None:
            read, seen = read[only], seen[only]
        return Effect(max(0.0, float(np.mean(divergences))), float(read.sum() / seen.sum()))

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
