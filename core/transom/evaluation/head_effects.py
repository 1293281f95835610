"""Measures how much each KV head of a model must read. The result is kept as the `heads` of its sparsity policies.

One KV head at a time is made sparse while all others read every key. The divergence of the logits from those of dense
attention is measured at the end of a few long passages, in exact arithmetic, because rounding would hide the effect of
one head. In most models a few heads, which find single tokens and copy what follows them, cause most of the divergence.
A head that alone causes more than a tenth of the sum over all heads, on any passage, stays dense. A head that hardly
matters on any passage reads less. Finer shares for each head were tried: they fit the passages that they were measured
on, and were no better on others.

Uses sessions of the contract, whatever the backend, as long as it supports a policy for each step.
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
from transom.preparation.agreement import log_softmax
from transom.sparsity import DENSE, PRESETS, Sparsity

if TYPE_CHECKING:
    from transom.generation.model import Model
    from transom.sparsity import Heads

NEW = 128
"""Tokens at the end of each passage whose logits are compared: whole blocks of 64."""
MEASURED = 2.0
"""Factor on 1 - coverage of `balanced` for the measured head: large enough for an effect above noise."""
DENSE_SHARE = 0.1
"""Share of the divergence of all heads on a passage above which a head stays dense."""
STANDS_OUT = 3.0
"""Multiple of the mean divergence that a dense head must also exceed; this matters in models with few heads."""
LOOSE_SHARE = 0.15
"""Share of the mean divergence of the non-dense heads; a head below it on every passage is loose."""
LOOSE = 4.0
"""Factor on 1 - coverage for a loose head."""

Progress = Callable[[int, int], None]
Array = np.ndarray[Any, np.dtype[Any]]


class Measurements(Protocol):
    """Keeps measured heads, so that an interrupted calibration continues where it stopped."""

    def read(self) -> dict[str, list[float]]:
        """The kept values by name; empty at first."""

    def write(self, values: Mapping[str, list[float]]) -> None: ...


@dataclass(frozen=True)
class Effect:
    """The effect of a policy on a model."""

    divergences: tuple[float, ...]
    """Kullback–Leibler divergence from dense attention for each passage: mean over the compared tokens, nats."""
    density: float
    """Share of the keys that the sparse heads read."""

    @property
    def divergence(self) -> float:
        """The mean over the passages."""
        return sum(self.divergences) / len(self.divergences)


@dataclass(frozen=True)
class HeadCalibration:
    """The result of a calibration."""

    heads: Heads
    before: Effect
    """Effect with all heads sparse by `balanced`, without calibration."""
    after: Effect
    """Effect of `balanced` with these heads."""
    effects: tuple[tuple[Effect, ...], ...]
    """Effect of each layer's KV heads, each alone and at `MEASURED`."""
    seconds: float

    @property
    def dense_heads(self) -> list[tuple[int, int]]:
        """(layer, KV head) of the heads that stay dense."""
        return [(i, h) for i, layer in enumerate(self.heads) for h, m in enumerate(layer) if m == 0]

    @property
    def loose_heads(self) -> list[tuple[int, int]]:
        """(layer, KV head) of the heads that read less than the others."""
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
        taken: token ids of each passage, all of the same length, as `passages` returns them.
        memory: keeps measured heads, so that an interrupted calibration continues.
        progress: called with (measured heads, all heads).

    Raises:
        OptionError: the model's backend does not support a policy for each step.
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
                f"The backend {model.report.backend} does not support a sparsity policy for each step",
                "Calibrate on a backend that does, such as --backend reference",
            )
        measure = _Measure(session, [list(ids) for ids in taken.values()], counts)
        try:
            effects: list[tuple[Effect, ...]] = []
            done, total = 0, sum(counts)
            for layer, heads in enumerate(counts):
                row: list[Effect] = []
                for head in range(heads):
                    name = f"{layer}.{head}"
                    if len(kept.get(name, ())) != len(taken) + 1:
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
    """Measures policies on passages whose beginnings were read once, with dense attention."""

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
        self._exact = [log_softmax(rows) for rows in exact]

    def __call__(self, heads: Heads, only: tuple[int, int] | None = None) -> Effect:
        """The effect of `balanced` with these heads; the density is that of all heads, or of `only` (layer, head)."""
        policy = Sparsity.from_dict({**PRESETS["balanced"].to_dict(), "heads": [list(layer) for layer in heads]})
        rows, (read, seen) = self._run(policy.to_string())
        found = [_divergence(exact, log_softmax(r)) for exact, r in zip(self._exact, rows, strict=True)]
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
                found.append(np.asarray(rows, np.float32))
                total = total + np.asarray(self._session.keys_read(fork))
            finally:
                fork.free()
        return found, total


def _divergence(exact: Array, other: Array) -> float:
    return float((np.exp(exact) * (exact - other)).sum(-1, dtype=np.float64).mean())
