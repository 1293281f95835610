"""Keys without their mean give the same attention, and int8 holds them more finely where the mean is large.

Draws: float32 results are compared within rounding; the gain is a factor of ten and more where the mean is a hundred
times the rest, whatever is drawn.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from levels import LEVELS, NATIVE, pytestmark  # noqa: F401  pytest reads the mark from here
from programs import error
from redraws import without_close_choices
from test_decoders import EXACT, INT8, built

from transom.contract import Limits, Work
from transom.reference.executor import Executor
from transom.reference.session import ReferenceSession
from transom.sparsity import Sparsity
from transom.testing.bench import ReferenceOracle
from transom.testing.models import tiny_decoder
from transom_openvino_cpu.native.calibration_run import CalibrationRun
from transom_openvino_cpu.native.engine import NativeEngine
from transom_openvino_cpu.native.key_means import KeyMeans, movable, subtracted
from transom_openvino_cpu.native.program import NativeProgram
from transom_openvino_cpu.sparse_session import NativeSession

Array = np.ndarray[Any, np.dtype[Any]]


def _stored(made: tuple[NativeProgram, bytes], folder: Path) -> tuple[NativeProgram, Path]:
    (folder / "weights.bin").write_bytes(made[1])
    return made[0], folder / "weights.bin"


def _measured(program: NativeProgram, weights: Path, level: str, texts: list[list[int]]) -> list[Array]:
    means = KeyMeans(program)
    for _, keys in CalibrationRun(weights, level, 2, texts, "f32").wide(program):
        means.add(keys)
    return means.means()


def _logits(program: NativeProgram, weights: Path, tokens: list[int], level: str) -> Array:
    engine = NativeEngine(program, weights, level, 2)
    try:
        pages = list(range(-(-len(tokens) // engine.page_tokens)))
        engine.bind_pages(len(pages))
        return engine.step([np.asarray(tokens)], [0], [pages], list(range(len(tokens))))
    finally:
        engine.close()


@pytest.mark.parametrize("name", ["gqa", "multi_query", "window", "value_width", "partial_rotary", "linear_bias"])
def test_logits_stay_what_they_are(name: str, rng: np.random.Generator, tmp_path: Path) -> None:
    from transom.testing.models import VARIANTS

    graph = tiny_decoder(rng, **VARIANTS[name])
    program, weights = _stored(built(graph, EXACT), tmp_path)
    assert len(movable(program)) == len(program.layers)
    shape = [(layer.kv_heads, layer.head_dim) for layer in program.layers]
    shifted = subtracted(program, weights, [rng.standard_normal(s).astype(np.float32) * 4 for s in shape])
    tokens = rng.integers(0, 50, 100).tolist()
    wanted = ReferenceOracle(graph).logits(tokens)
    assert error(_logits(shifted, weights, tokens, NATIVE[0]), wanted) < 1e-4


@pytest.mark.parametrize("keywords", [{"softcap": 5.0}, {"sinks": True}], ids=["soft cap", "sinks"])
def test_keys_whose_mean_shows_keep_it(keywords: dict[str, Any], rng: np.random.Generator, tmp_path: Path) -> None:
    program, weights = _stored(built(tiny_decoder(rng, **keywords), EXACT), tmp_path)
    assert not movable(program)
    means = [np.ones((layer.kv_heads, layer.head_dim), np.float32) for layer in program.layers]
    assert subtracted(program, weights, means).ops == program.ops


def test_keys_that_are_values_too_keep_their_mean(rng: np.random.Generator) -> None:
    program = built(tiny_decoder(rng), EXACT)[0]
    ops = tuple(replace(op, c=op.b) if op.kind == "attend" else op for op in program.ops)
    assert not movable(replace(program, ops=ops))


def test_what_was_measured_and_subtracted_is_gone(rng: np.random.Generator, tmp_path: Path) -> None:
    program, weights = _stored(built(tiny_decoder(rng, head_dim=32), EXACT), tmp_path)
    texts = [rng.integers(0, 50, n).tolist() for n in (70, 3, 128)]
    before = _measured(program, weights, NATIVE[0], texts)
    shifted = subtracted(program, weights, before)
    assert [m.shape for m in before] == [(layer.kv_heads, layer.head_dim) for layer in program.layers]
    for mean, left in zip(before, _measured(shifted, weights, NATIVE[0], texts), strict=True):
        assert np.abs(mean).max() > 1e-3
        assert np.abs(left).max() < 1e-4 * max(1.0, float(np.abs(mean).max()))


@pytest.mark.parametrize("level", LEVELS)
def test_a_large_mean_costs_the_int8_cache_nothing(level: str, rng: np.random.Generator, tmp_path: Path) -> None:
    """Channels of 300 in all keys, as a bias gives them: alone, they would take the scale of all others."""
    plain, weights = _stored(built(tiny_decoder(rng, head_dim=64), EXACT), tmp_path)
    tokens = rng.integers(0, 50, 100).tolist()
    wanted = _logits(plain, weights, tokens, level)
    biased = subtracted(
        plain, weights, [300 * rng.choice([-1, 0, 0, 1], (x.kv_heads, x.head_dim)).astype("f4") for x in plain.layers]
    )
    biased = replace(biased, cache="int8")
    texts = [rng.integers(0, 50, 100).tolist() for _ in range(3)]
    lost = error(_logits(biased, weights, tokens, level), wanted)
    smoothed = subtracted(biased, weights, _measured(biased, weights, level, texts))
    assert error(_logits(smoothed, weights, tokens, level), wanted) < lost / 10


@pytest.mark.parametrize(
    "policy",
    [
        Sparsity(0.6, dense_below=128),
        Sparsity(0.3, local_window=128, columns=0, node=64, unit=64, score="mean", dense_below=128),
    ],
    ids=["coverage", "mean"],
)
def test_a_sparse_policy_chooses_the_same(policy: Sparsity, rng: np.random.Generator, tmp_path: Path) -> None:
    limits = Limits(4, 1024, 1024, 0)

    def draw() -> Any:
        graph = tiny_decoder(rng, scale=1.0, context=1024)
        assert graph.decoder is not None
        text, tokens = policy.for_model(graph.decoder).to_string(), rng.integers(0, 50, 512).tolist()
        reference = ReferenceSession(Executor(graph), graph.decoder, limits)
        state = reference.new_state()
        rows = reference.step([Work(state, tokens, "all", sparsity=text)])[0]
        return graph, text, tokens, np.asarray(rows), np.asarray(reference.keys_read(state))

    graph, text, tokens, wanted, counted = without_close_choices(draw, 1e-3)
    program, weights = _stored(built(graph, EXACT), tmp_path)
    shape = [(layer.kv_heads, layer.head_dim) for layer in program.layers]
    shifted = subtracted(program, weights, [rng.standard_normal(s).astype(np.float32) for s in shape])
    session = NativeSession(NativeEngine(shifted, weights, NATIVE[0], 2), graph.decoder, context=1024, pages=16)
    try:
        state = session.new_state()
        rows = session.step([Work(state, tokens, "all", sparsity=text)])[0]
        np.testing.assert_array_equal(session.keys_read(state), counted)
        assert error(np.asarray(rows), wanted) < 1e-3
    finally:
        session.close()


def test_a_program_with_means_is_stored_and_opened_again(rng: np.random.Generator, tmp_path: Path) -> None:
    program, weights = _stored(built(tiny_decoder(rng, weights="int4"), INT8), tmp_path)
    means = _measured(program, weights, NATIVE[0], [[1, 2, 3]])
    shifted = subtracted(program, weights, means)
    assert weights.stat().st_size == shifted.weight_bytes > program.weight_bytes
    again = NativeProgram.from_json(shifted.to_json())
    assert again == shifted
    assert sum(op.kind == "bias" for op in again.ops) == len(movable(program))
    assert np.isfinite(_logits(again, weights, [1, 2, 3], NATIVE[0])).all()
