"""Chooses by measuring which products of a native program, and whether its cache, are wider than 8 bits.

Some models lose much in 8 bits, and each in another place: a few large channels of keys or of a product's input take
the scale of all others. So the program is run on calibration texts with everything wide, and in int8. If the two
diverge by more than the limit on any text, each kind of product and the cache is made wider alone. Those that gain most
for what they cost are then made wider together, until the divergence is far below the limit (a sensitivity analysis by
groups of layers as in HAWQ, Dong and others 2019, arXiv:1905.03696, with the divergence of the output in place of
curvature).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from transom_openvino_cpu.native.program import NativeProgram

Array = np.ndarray[Any, np.dtype[Any]]

LIMIT = 0.01
"""Largest mean divergence from the wide program that int8 may cost, nats a token, on any of the texts."""
MARGIN = 0.25
"""Share of the limit that a program with wide products may reach. Where int8 loses much, a few positions lose nats, and
other texts have other such positions."""
KEPT = 0.7
"""Share of the limit that int8 may reach on a calibration text, because other texts differ from it."""
WORST = 1
"""Texts that the search looks at: those that lose most in int8."""
LEAST = 1e-4
"""Least probability of a token that is compared alone; all others are compared as one."""
CACHE = "cache"
WIDE_CACHE = "bf16"
"""On every processor: two bytes a number are what the host counts when it plans memory."""
CACHE_COST = 0.3
"""What a wider cache costs, in parts of what it costs to make all products wider."""


@dataclass(frozen=True)
class MixedPrecision:
    """A program with the widths that were chosen, and what they lose."""

    program: NativeProgram
    wide: tuple[str, ...]
    """Kinds of products that are not in int8: `kinds`."""
    divergence: float
    """Mean over the positions of the texts, nats a token."""


def kinds(program: NativeProgram) -> dict[int, str]:
    """Index of each int8 product -> what it computes: `"q/k/v"`, `"attention output"`, `"gate/up"` or `"down"`.

    Products are told apart by their place: those that attention reads from, the first one after an attention, the last
    one before the next attention's, and those between.
    """
    names: dict[int, str] = {}
    waiting: list[int] = []
    """Products since the last attention."""
    for index, op in enumerate(program.ops):
        if op.kind == "linear" and op.dst.buffer != program.output:
            waiting.append(index)
        elif op.kind == "attend":
            for buffer in {op.a.buffer, op.b.buffer, op.c.buffer}:
                writers = [i for i in waiting if program.ops[i].dst.buffer == buffer]
                names.update(dict.fromkeys(writers[-1:], "q/k/v"))
            names.update(_after_attention([i for i in waiting if i not in names]))
            waiting.clear()
    names.update(_after_attention(waiting))
    return {index: name for index, name in sorted(names.items()) if program.ops[index].by == "int8"}


def _after_attention(products: Sequence[int]) -> dict[int, str]:
    found = dict.fromkeys(products, "gate/up")
    found.update(dict.fromkeys(products[-1:], "down"))
    found.update(dict.fromkeys(products[:1], "attention output"))
    return found


def widened(program: NativeProgram, names: frozenset[str], form: str) -> NativeProgram:
    """The program with these kinds of products in `"bf16"` or `"f32"`, and the cache, if it is among them, wide."""
    wide = {index for index, name in kinds(program).items() if name in names}
    ops = tuple(replace(op, by=form) if index in wide else op for index, op in enumerate(program.ops))
    return replace(program, ops=ops, cache=WIDE_CACHE if CACHE in names else program.cache)


def choose(
    program: NativeProgram,
    expected: Sequence[Expected],
    run: Callable[[NativeProgram, Sequence[int]], Iterable[Array]],
    *,
    limit: float,
    form: str,
    progress: Callable[[float], None],
) -> MixedPrecision:
    """The program as it is if it keeps the limit, else with as few wide products as keep it by a margin.

    Args:
        program: its products and cache are int8.
        expected: what a program with nothing in 8 bits predicts, of each text.
        run: computes logits with a program at the same positions, float32 [positions, vocabulary] for each text of
            these numbers.
        limit: nats a token.
        form: the wider format of products, `"bf16"` or `"f32"`.
    """
    size: dict[str, int] = {}
    for index, name in kinds(program).items():
        matrix = program.matrices[program.ops[index].matrix]
        size[name] = size.get(name, 0) + matrix.rows * matrix.columns
    costs: dict[str, float] = {name: number / sum(size.values()) for name, number in size.items()}
    costs[CACHE] = CACHE_COST
    texts = len(expected)
    which: Sequence[int] = range(texts)
    known: dict[frozenset[str], list[float]] = {}

    def losses(names: frozenset[str]) -> list[float]:
        """The mean divergence on each text of `which`."""
        if names not in known:
            progress(min(0.99, len(known) / (2 * len(costs))))
            got = run(widened(program, names, form), which)
            known[names] = [
                float(expected[text].divergences(rows).mean()) for text, rows in zip(which, got, strict=True)
            ]
        return known[names]

    taken = frozenset[str]()
    in_int8 = losses(taken)
    if max(in_int8) > KEPT * limit:
        which = sorted(sorted(range(texts), key=lambda text: -in_int8[text])[:WORST])
        known[taken] = [in_int8[text] for text in which]
        most = MARGIN * limit
        gains = {name: (sum(losses(taken)) - sum(losses(frozenset((name,))))) / cost for name, cost in costs.items()}
        for name in sorted(gains, key=lambda name: -gains[name]):
            taken |= {name}
            if max(losses(taken)) <= most:
                break
        for name in sorted(taken, key=lambda name: -costs[name]):
            if max(losses(taken - {name})) <= most:
                taken -= {name}
        which = range(texts)
        known.clear()
    chosen = widened(program, taken, form)
    return MixedPrecision(chosen, tuple(name for name in size if name in taken), sum(losses(taken)) / texts)


@dataclass(frozen=True)
class Expected:
    """What the wide program predicts at each position of a text."""

    tokens: list[Array]
    """Of each position, the tokens above the probability `LEAST`: int64 [tokens]."""
    log_p: list[Array]
    """Their logarithms of probability, float32 [tokens]."""

    @classmethod
    def of(cls, logits: Array) -> Expected:
        """From logits, float32 [positions, vocabulary]."""
        tokens, log_p = [], []
        for row in logits:
            total = _log_sum(row)
            tokens.append(np.flatnonzero(row > total + np.log(LEAST)))
            log_p.append(row[tokens[-1]] - total)
        return cls(tokens, log_p)

    def divergences(self, logits: Array) -> Array:
        """The Kullback–Leibler divergence at each position, nats: float64 [positions]; infinite where a logit is not
        finite. The tokens below `LEAST` count as one, which makes it a lower bound.

        Args:
            logits: float32 [positions, vocabulary].
        """
        found = np.empty(len(logits))
        for at, (row, tokens, log_p) in enumerate(zip(logits, self.tokens, self.log_p, strict=True)):
            log_q = row[tokens] - _log_sum(row)
            p, q = np.exp(log_p, dtype=np.float64), np.exp(log_q, dtype=np.float64)
            rest_p, rest_q = max(1.0 - p.sum(), 1e-6), max(1.0 - q.sum(), 1e-6)
            found[at] = np.dot(p, log_p - log_q) + rest_p * np.log(rest_p / rest_q)
        return np.where(np.isfinite(found), np.maximum(found, 0.0), np.inf)


def _log_sum(row: Array) -> np.float32:
    """The logarithm of the sum of the exponentials of the row's numbers."""
    most = row.max()
    with np.errstate(invalid="ignore"):  # infinity less itself
        return np.float32(most + np.log(np.exp(row - most).sum(dtype=np.float64)))
