"""Sparse attention over whole decoders: what the native library chooses and gives, beside the NumPy reference.

Draws: a model is drawn again until no choice is closer to another one than `CLOSE`. Narrow caches are judged by a
quarter of their rows, since one unit at the edge of a choice changes all later rows; one of eight draws must be within
the bound (`redraws.one_within`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from levels import LEVELS, pytestmark  # noqa: F401  pytest reads the mark from here
from programs import Machine, error
from redraws import one_within, without_close_choices
from test_decoders import EXACT, built

from transom.contract import Limits, Work
from transom.graph import Graph
from transom.reference.executor import Executor
from transom.reference.session import ReferenceSession
from transom.signature import Decoder
from transom.sparsity import Sparsity
from transom.testing.models import tiny_decoder
from transom_openvino_cpu.sparse_session import NativeSession

Array = np.ndarray[Any, np.dtype[Any]]

CONTEXT = 1024
BASE = Sparsity(0.6, dense_below=128)
CLASSIC = Sparsity(0.3, local_window=128, columns=0, node=64, unit=64, score="mean", dense_below=128)
CLOSE = 1e-4
"""A choice with a smaller margin may turn out differently by rounding; such a draw is made again."""

CASES: dict[str, tuple[dict[str, Any], Sparsity]] = {
    "plain": ({}, BASE),
    "few are read": ({}, replace(BASE, coverage=0.3)),
    "one query head for each KV head": ({"q_heads": 2, "kv_heads": 2}, BASE),
    "eight query heads for one": ({"q_heads": 8, "kv_heads": 1, "head_dim": 32}, BASE),
    "a soft cap": ({"softcap": 10.0}, BASE),
    "a window": ({"window": 300}, BASE),
    "sinks": ({"sinks": True}, BASE),
    "all of it": ({"window": 260, "softcap": 8.0, "sinks": True, "value_dim": 48}, replace(BASE, coverage=0.3)),
    "no columns": ({}, replace(BASE, columns=0)),
    "few columns": ({}, replace(BASE, columns=7)),
    "units of 8": ({}, replace(BASE, unit=8)),
    "units of 64": ({}, replace(BASE, unit=64)),
    "one row": ({}, replace(BASE, rows=1)),
    "a wide local window": ({}, replace(BASE, coverage=0.1, local_window=150)),
    "so many units": ({}, replace(BASE, top_k=5)),
    "no fewer than": ({}, replace(BASE, coverage=0.2, min_density=0.4)),
    "no more than": ({}, replace(BASE, coverage=0.99, max_density=0.5)),
    "heads of their own": ({"kv_heads": 2}, replace(BASE, heads=((0.0, 1.0), (4.0, 0.3)))),
    "classic": ({}, CLASSIC),
    "classic with all of it": ({"window": 260, "softcap": 8.0, "sinks": True}, CLASSIC),
    "classic in small nodes": ({}, replace(CLASSIC, node=8, unit=16)),
    "classic in middling nodes": ({"q_heads": 4, "kv_heads": 1}, replace(CLASSIC, node=16, unit=32, rows=4)),
}  # fmt: skip
CHUNKS = {"columns": (300, 64, 200, 20), "none": (300, 64, 200, 20, 1, 1, 3)}
"""New tokens of each step. While decoding, an engine takes columns from queries that the reference has forgotten."""


def _run(session: Any, policy: str, tokens: Array, steps: tuple[int, ...]) -> tuple[Array, Array]:
    """Logits of all tokens, and the keys that were read."""
    state, rows, at = session.new_state(), [], 0
    for count in steps:
        rows.append(session.step([Work(state, tokens[at : at + count].tolist(), "all", sparsity=policy)])[0])
        at += count
    return np.concatenate(rows).astype(np.float64), np.asarray(session.keys_read(state))


@pytest.mark.parametrize("name", CASES)
def test_choice_and_result_are_those_of_the_reference(name: str, rng: np.random.Generator) -> None:
    keywords, policy = CASES[name]
    steps = CHUNKS["columns" if policy.columns else "none"]

    def draw() -> tuple[Graph, Decoder, str, Array, tuple[Array, Array]]:
        graph = tiny_decoder(rng, **{"scale": 1.0, "context": CONTEXT, **keywords})
        decoder = graph.decoder
        assert decoder is not None
        text = policy.for_model(decoder).to_string()
        tokens = rng.integers(0, decoder.vocabulary, sum(steps))
        limits = Limits(4, 1024, CONTEXT, 0)
        return (
            graph,
            decoder,
            text,
            tokens,
            _run(ReferenceSession(Executor(graph), decoder, limits), text, tokens, steps),
        )

    graph, decoder, text, tokens, (wanted, counted) = without_close_choices(draw, CLOSE)
    read, seen = counted
    assert read.sum() < 0.98 * seen.sum(), "the case leaves nothing out"
    made = built(graph, EXACT)
    for level in LEVELS:
        with Machine(made, level, threads=2, pages=None) as machine:
            session = NativeSession(machine.engine, decoder, context=CONTEXT, pages=CONTEXT // 64)
            got, counts = _run(session, text, tokens, steps)
            assert error(got, wanted) < 1e-4, level
            np.testing.assert_array_equal(counts, counted, err_msg=level)
            session.close()


@pytest.mark.parametrize("cache", ["bf16", "int8"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.sweep(  # the test above has each case in float32
    but=(
        "plain-bf16",
        "all of it-bf16",
        "classic-bf16",
        "plain-int8",
        "all of it-int8",
        "classic-int8",
        "eight query heads for one-int8",
        "no columns-int8",
        "one row-int8",
        "so many units-int8",
        "heads of their own-int8",
    )
)
def test_narrow_caches_choose_and_give_nearly_the_same(name: str, cache: str, rng: np.random.Generator) -> None:
    """Compared with a float32 cache, which the test above compares with the reference."""
    keywords, policy = CASES[name]
    steps = CHUNKS["none"]

    def measure(draw: int) -> dict[str, tuple[float, float]]:
        """Of each level: how much more or less is read, and the error of the logits."""
        graph = tiny_decoder(rng, **{"scale": 1.0, "context": CONTEXT, **keywords})
        decoder = graph.decoder
        assert decoder is not None
        text = policy.for_model(decoder).to_string()
        tokens = rng.integers(0, decoder.vocabulary, sum(steps))
        program, weights = built(graph, EXACT)
        measured = {}
        for level in LEVELS:
            found = []
            for kept in ("f32", cache):
                with Machine((replace(program, cache=kept), weights), level, threads=2, pages=None) as machine:
                    session = NativeSession(machine.engine, decoder, context=CONTEXT, pages=CONTEXT // 64)
                    found.append(_run(session, text, tokens, steps))
                    session.close()
            (wanted, (read, seen)), (got, counts) = found
            np.testing.assert_array_equal(counts[1], seen)
            # Rounding may change the choice of one unit. In a random model that changes the logits of all later tokens
            # by much, in a rare draw those of more than half of the rows. A wrong kernel would change every row.
            off = np.quantile(np.linalg.norm(got - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1), 0.25)
            measured[level] = abs(counts[0].sum() / read.sum() - 1), float(off)
        return measured

    most = {"bf16": 0.02, "int8": 0.06}[cache]
    one_within(measure, lambda found: all(share < 0.1 and off < most for share, off in found.values()))
