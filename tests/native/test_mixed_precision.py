"""`auto` widens, by measuring, the products and the cache in which a model loses too much, and no others.

Draws: losses are made up, or compared with a formula in double precision; of a drawn decoder it is only said that int8
loses more than nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from levels import DEVICE, LEVELS, pytestmark  # noqa: F401  pytest reads the mark from here
from test_decoders import built

from transom.contract import Artifact
from transom.preparation.agreement import compare
from transom.testing.models import tiny_decoder
from transom_openvino_cpu.backend import OpenVinoCpu
from transom_openvino_cpu.native import calibration_run, library, mixed_precision
from transom_openvino_cpu.native.mixed_precision import CACHE, Expected, choose, kinds, widened
from transom_openvino_cpu.native.program import NativeProgram
from transom_openvino_cpu.precision import CpuPrecision

Array = np.ndarray[Any, np.dtype[Any]]
AMX = frozenset({"amx_tile", "amx_int8", "amx_bf16"})
KINDS = {"q/k/v", "attention output", "gate/up", "down"}
MEASURED = CpuPrecision("int8", "bf16", True)


@pytest.fixture
def program(rng: np.random.Generator) -> NativeProgram:
    made: NativeProgram = built(tiny_decoder(rng, weights="int4", layers=2), MEASURED)[0]
    return made


def test_products_are_told_apart_by_their_place(program: NativeProgram) -> None:
    found = list(kinds(program).values())
    assert found == ["q/k/v", "attention output", "gate/up", "down"] * 2
    assert all(program.ops[index].by == "int8" for index in kinds(program))


def test_only_what_is_named_becomes_wider(program: NativeProgram) -> None:
    made = widened(program, frozenset({"down"}), "bf16")
    assert [op.by for op in made.ops if op.by != "f32"] == ["int8", "int8", "int8", "bf16"] * 2
    assert made.cache == "int8"
    made = widened(program, frozenset({CACHE}), "f32")
    assert (made.ops, made.cache) == (program.ops, "bf16")


class MadeUp:
    """Runs programs whose narrow parts cost a made-up divergence each, the same on every text."""

    def __init__(self, losses: dict[str, float]) -> None:
        self.losses, self.runs = losses, 0

    def __call__(self, program: NativeProgram, which: Sequence[int]) -> Iterator[Array]:
        self.runs += 1
        narrow = {name for index, name in kinds(program).items()} | ({CACHE} if program.cache == "int8" else set())
        lost = sum(self.losses.get(name, 0.0) for name in narrow)
        # From probabilities of (1/2, 1/2): the divergence from (p, 1 - p) is -log(4 p (1 - p)) / 2.
        p = 0.5 + 0.5 * math.sqrt(1 - math.exp(-2 * lost))
        for _ in which:
            yield np.log(np.array([[p, 1 - p]], np.float32))


@pytest.mark.parametrize(
    ("losses", "wide", "cache"),
    [
        ({}, (), "int8"),
        ({"q/k/v": 0.001, "down": 0.002, CACHE: 0.003}, (), "int8"),
        ({"q/k/v": 0.001, CACHE: 0.05}, (), "bf16"),
        ({"q/k/v": 0.001, "down": 0.05, CACHE: 0.001}, ("down",), "int8"),
        ({"q/k/v": 0.02, "down": 0.05, CACHE: 0.03}, ("q/k/v", "down"), "bf16"),
        (dict.fromkeys([*KINDS, CACHE], 1.0), ("q/k/v", "attention output", "gate/up", "down"), "bf16"),
    ],
    ids=["nothing lost", "little lost", "in the cache", "in one kind of product", "in three places", "everywhere"],
)
def test_what_loses_too_much_becomes_wider_and_nothing_else(
    losses: dict[str, float], wide: tuple[str, ...], cache: str, program: NativeProgram
) -> None:
    run, shares = MadeUp(losses), list[float]()
    expected = [Expected.of(np.log(np.array([[0.5, 0.5]], np.float32)))] * 4
    found = choose(program, expected, run, limit=0.01, form="bf16", progress=shares.append)
    assert (found.wide, found.program.cache) == (wide, cache)
    left = sum(loss for name, loss in losses.items() if name not in wide and (name, cache) != (CACHE, "bf16"))
    assert found.divergence == pytest.approx(left, abs=1e-4)
    assert all(0 <= share < 1 for share in shares)
    if not wide and cache == "int8":
        assert run.runs == 1  # a model that loses little costs one run


@pytest.mark.seeds(2516290496, 216869674)
def test_divergences_are_those_of_all_tokens_with_the_rare_ones_as_one(rng: np.random.Generator) -> None:
    logits = (rng.standard_normal((20, 500)) * 4).astype(np.float32)
    other = logits + (rng.standard_normal(logits.shape) * 0.3).astype(np.float32)
    found = Expected.of(logits).divergences(other)
    for row, value in enumerate(found):
        p, q = (np.exp(x[row].astype(np.float64)) / np.exp(x[row].astype(np.float64)).sum() for x in (logits, other))
        often = p > mixed_precision.LEAST
        p, q = (np.append(x[often], x[~often].sum()) for x in (p, q))
        # The logarithms of both sums are rounded to float32, about 1e-6 each.
        assert value == pytest.approx(np.dot(p, np.log(p / q)), abs=5e-6)
        # Tokens that count as one can only hide a difference (the log sum inequality).
        assert value < compare(logits[row : row + 1], other[row : row + 1]).kl_mean + 1e-6
    assert np.allclose(Expected.of(logits).divergences(logits), 0, atol=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_diverges_without_end(value: float, rng: np.random.Generator) -> None:
    logits = rng.standard_normal((2, 50)).astype(np.float32)
    other = logits.copy()
    other[1, 7] = value
    found = Expected.of(logits).divergences(other)
    assert found[0] < 1e-6
    assert found[1] == math.inf


def _compiled(
    rng: np.random.Generator, precision: str = "auto", max_kl: float | None = None, *, tiles: bool = False, **model: Any
) -> tuple[NativeProgram, Artifact]:
    graph = tiny_decoder(rng, weights="int4", layers=2, **model)
    vocabulary = graph.decoder.vocabulary if graph.decoder is not None else 0
    texts = tuple(tuple(rng.integers(0, vocabulary, 50).tolist()) for _ in range(2))
    features = (DEVICE.features | {"avx512_vnni", "avx512_bf16"}) - AMX
    device = replace(DEVICE, features=features | (AMX if tiles else set()))
    options = {"precision": precision, "calibration": texts, "max_kl": max_kl}
    artifact = OpenVinoCpu().compile(graph, device, options, lambda stage, share: None)
    written = artifact.files["program.json"]
    assert isinstance(written, bytes)
    return NativeProgram.from_json(written.decode()), artifact


@pytest.mark.skipif("avx512_bf16" not in LEVELS, reason="`auto` takes int8 on processors with VNNI")
def test_the_limit_decides_what_is_compiled_and_the_note_says_so(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixed_precision, "LIMIT", 10.0)
    program, artifact = _compiled(rng)
    assert (set(kinds(program).values()), program.cache) == (KINDS, "int8")
    assert artifact.notes[0].startswith(
        "precision: int8 matrix products, float32 elsewhere, int8 cache; mean divergence"
    )
    monkeypatch.setattr(mixed_precision, "LIMIT", 1e-12)
    program, artifact = _compiled(rng)
    assert (kinds(program), program.cache) == ({}, "bf16")
    assert artifact.notes[0].startswith("precision: bfloat16 matrix products, float32 elsewhere, bfloat16 cache")
    program, artifact = _compiled(rng, "fast")
    assert (set(kinds(program).values()), program.cache) == (KINDS, "int8")  # `fast` is never widened
    assert "divergence" not in artifact.notes[0]


@pytest.mark.skipif("avx512_bf16" not in LEVELS, reason="`auto` takes int8 on processors with VNNI")
def test_fast_measures_nothing_where_keys_must_keep_their_mean(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration_run, "CalibrationRun", None)  # a run would fail
    program, _ = _compiled(rng, "fast", softcap=20.0)
    assert program.cache == "int8"
    assert not any(op.kind == "bias" for op in program.ops)


@pytest.mark.skipif("avx512_bf16" not in LEVELS, reason="AMX has the code of AVX-512 BF16, too")
@pytest.mark.parametrize(("max_kl", "cache"), [(10.0, "int8"), (1e-12, "bf16")])
def test_on_amx_products_are_bfloat16_and_the_cache_is_measured(
    max_kl: float, cache: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "permitted", lambda level: True)
    program, artifact = _compiled(rng, max_kl=max_kl, tiles=True)
    assert {op.by for op in program.ops if op.kind == "linear"} == {"bf16", "f32"}
    assert (kinds(program), program.cache) == ({}, cache)
    described = {"int8": "int8", "bf16": "bfloat16"}[cache]
    assert artifact.notes[0].startswith(
        f"precision: bfloat16 matrix products, float32 elsewhere, {described} cache; mean divergence"
    )
    program, artifact = _compiled(rng, "fast", tiles=True)
    assert (kinds(program), program.cache) == ({}, "int8")
    assert artifact.notes[0] == "precision: bfloat16 matrix products, float32 elsewhere, int8 cache"


@pytest.mark.skipif("avx512_bf16" not in LEVELS, reason="`auto` takes int8 on processors with VNNI")
def test_the_user_may_set_the_limit(rng: np.random.Generator) -> None:
    program, _ = _compiled(rng, max_kl=10.0)
    assert program.cache == "int8"
    program, _ = _compiled(rng, max_kl=1e-12)
    assert (kinds(program), program.cache) == ({}, "bf16")
