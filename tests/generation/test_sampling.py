"""The sampler agrees with a plain, slow implementation and with transformers' processors.

Draws: probabilities are measured on an even grid, so they are off by one step of it and by one token at the edge of a
nucleus.
"""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transom.generation.params import SamplingParams
from transom.generation.sampling import BadLogits, Sampler, log_probabilities
from transom.sessions.steps import top_k

VOCABULARY = 700


def plain_probabilities(row: Any, params: SamplingParams, prompt: list[int], output: list[int]) -> np.ndarray:
    """float64 [vocabulary]: the distribution to draw from, spelled out with sorting and loops."""
    scores = [float(x) for x in row]
    for token, bias in params.logit_bias.items():
        scores[token] += bias
    for token in set(prompt) | set(output):
        value = scores[token]
        scores[token] = value * params.repetition_penalty if value < 0 else value / params.repetition_penalty
    for token in set(output):
        scores[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    if params.top_k:
        order = order[: params.top_k]
    best = scores[order[0]]
    weights = [math.exp((scores[i] - best) / params.temperature) for i in order]
    whole, reached, kept = sum(weights), 0.0, 0
    for weight in weights:
        if kept and reached >= params.top_p * whole:
            break
        reached += weight
        kept += 1
    if params.top_p < 1:
        order, weights = order[:kept], weights[:kept]
    pairs = [(i, w) for i, w in zip(order, weights, strict=True) if w >= params.min_p * weights[0]]
    probabilities = np.zeros(len(scores))
    for i, weight in pairs:
        probabilities[i] = weight
    return probabilities / probabilities.sum()


def measured_probabilities(row: Any, params: SamplingParams, prompt: list[int], output: list[int]) -> np.ndarray:
    """The distribution that the sampler draws from, from evenly spread numbers instead of random ones."""
    sampler = Sampler(params, VOCABULARY, prompt=prompt)
    if sampler._penalties is not None:
        for token in output:
            sampler._penalties.add(token)
        sampler._penalties.add = lambda token: None  # type: ignore[method-assign]
    counts = np.zeros(VOCABULARY)
    tries = 2000
    for i in range(tries):
        sampler._uniform = lambda i=i: (i + 0.5) / tries  # type: ignore[method-assign,misc]
        counts[sampler.sample(row).token] += 1
    return counts / tries


settings_of_sampling = st.fixed_dictionaries(
    {
        "temperature": st.floats(0.2, 3.0),
        "top_k": st.sampled_from([0, 1, 2, 7, 50, 600, 5000]),
        "top_p": st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.01]),
        "min_p": st.sampled_from([0.0, 0.01, 0.2, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.8]),
        "presence_penalty": st.sampled_from([0.0, 0.7, -0.5]),
        "frequency_penalty": st.sampled_from([0.0, 0.4]),
        "logit_bias": st.sampled_from([{}, {3: 4.0, 5: -math.inf}]),
    }
)


@settings(max_examples=60, deadline=None)
@given(settings_of_sampling, st.integers(0, 2**32), st.floats(0.3, 5.0))
def test_the_distribution_is_that_of_the_plain_implementation(options: Any, seed: int, spread: float) -> None:
    random_numbers = np.random.default_rng(seed)
    row = (random_numbers.standard_normal(VOCABULARY) * spread).astype(np.float32)
    prompt = random_numbers.integers(0, VOCABULARY, 20).tolist()
    output = random_numbers.integers(0, 12, 15).tolist()
    params = SamplingParams(**options)
    expected = plain_probabilities(row, params, prompt, output)
    measured = measured_probabilities(row, params, prompt, output)
    # Evenly spread numbers meet an interval of length p within one of 2000 p times; the rest is float32 at the edge
    # of a nucleus, which may move one token.
    assert np.abs(measured - expected).max() < 0.0011 + 2 * np.sort(expected[expected > 0])[0]
    assert set(np.flatnonzero(measured)) <= set(np.flatnonzero(expected > 0)) or options["top_p"] < 1


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 20},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"repetition_penalty": 1.4},
        {"top_k": 40, "top_p": 0.7, "min_p": 0.05, "repetition_penalty": 1.2},
    ],
    ids=lambda o: "+".join(o),
)
def test_penalties_and_filters_agree_with_transformers(options: Any, rng: np.random.Generator) -> None:
    import torch
    from transformers.generation import logits_process as hf

    for _ in range(5):
        row = (rng.standard_normal(VOCABULARY) * 3).astype(np.float32)
        prompt = rng.integers(0, VOCABULARY, 30).tolist()
        temperature = float(rng.uniform(0.3, 1.5))
        processors = []
        if "repetition_penalty" in options:
            processors.append(hf.RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
        processors.append(hf.TemperatureLogitsWarper(temperature))
        if "top_k" in options:
            processors.append(hf.TopKLogitsWarper(options["top_k"]))
        if "top_p" in options:
            processors.append(hf.TopPLogitsWarper(options["top_p"]))
        if "min_p" in options:
            processors.append(hf.MinPLogitsWarper(options["min_p"]))
        scores = torch.from_numpy(row.copy())[None]
        for processor in processors:
            scores = processor(torch.tensor([prompt]), scores)
        expected = torch.softmax(scores[0].double(), -1).numpy()
        params = SamplingParams(temperature=temperature, **options)
        measured = measured_probabilities(row, params, prompt, [])
        assert np.abs(measured - expected).max() < 0.0011
        np.testing.assert_allclose(plain_probabilities(row, params, prompt, []), expected, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5000), st.integers(0, 2**32), st.data())
def test_top_k_is_exact_and_prefers_low_ids_among_equals(size: int, seed: int, data: Any) -> None:
    random_numbers = np.random.default_rng(seed)
    row = random_numbers.standard_normal(size).astype(np.float32)
    kind = data.draw(st.sampled_from(["plain", "ties", "sorted", "one block", "-inf"]))
    if kind == "ties":
        row = np.round(row)
    elif kind == "sorted":
        row = np.sort(row)[::-1].copy()
    elif kind == "one block":
        row[: size // 8] += 100
    elif kind == "-inf":
        row[random_numbers.random(size) < 0.99] = -np.inf
    k = data.draw(st.integers(1, size))
    expected = sorted(range(size), key=lambda i: (-row[i], i))[:k]
    assert top_k(row, k).tolist() == expected


def test_greedy_takes_the_first_of_equal_logits_and_copies_nothing() -> None:
    row = np.array([1, 5, 5, 2], dtype=np.float32)
    row.setflags(write=False)
    sampler = Sampler(SamplingParams(), 4)
    assert sampler.sample(row).token == 1
    assert sampler.top_k == 1
    assert sampler.sample((np.array([1]), np.array([5.0], np.float32))).token == 1


@pytest.mark.parametrize("options", [{"temperature": 0.7, "top_k": 9}, {"temperature": 2.0, "top_k": 30, "top_p": 0.6}])
def test_the_best_logits_give_the_same_tokens_as_whole_rows(options: Any, rng: np.random.Generator) -> None:
    params = SamplingParams(seed=5, **options)
    whole, best = Sampler(params, VOCABULARY), Sampler(params, VOCABULARY)
    for _ in range(50):
        row = (rng.standard_normal(VOCABULARY) * 3).astype(np.float32)
        ids = top_k(row, best.top_k)
        assert best.sample((ids, row[ids])).token == whole.sample(row).token


@pytest.mark.parametrize(
    "options",
    [
        {"logprobs": 0},
        {"repetition_penalty": 1.1},
        {"logit_bias": {1: 1.0}},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_k": 5000},
    ],
    ids=str,
)
def test_whole_rows_are_asked_for_where_the_best_do_not_suffice(options: Any) -> None:
    assert Sampler(SamplingParams(**options), VOCABULARY).top_k == 0


def test_the_given_row_is_never_changed(rng: np.random.Generator) -> None:
    row = rng.standard_normal(VOCABULARY).astype(np.float32)
    before = row.copy()
    params = SamplingParams(temperature=0.5, top_p=0.9, repetition_penalty=1.2, logit_bias={1: 5}, logprobs=3)
    Sampler(params, VOCABULARY, prompt=[1, 2]).sample(row)
    np.testing.assert_array_equal(row, before)


def test_a_seed_gives_the_same_tokens_again_and_another_index_others(rng: np.random.Generator) -> None:
    rows = (rng.standard_normal((40, VOCABULARY)) * 2).astype(np.float32)

    def draw(seed: int | None, index: int) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), VOCABULARY, index=index)
        return [sampler.sample(row).token for row in rows]

    assert draw(7, 0) == draw(7, 0)
    assert draw(7, 1) == draw(7, 1)
    assert len({tuple(draw(s, i)) for s, i in [(7, 0), (7, 1), (8, 0), (None, 0), (None, 0)]}) == 5


def test_seeds_mean_the_same_numbers_in_every_release() -> None:
    # The random numbers are guaranteed; float arithmetic on probabilities depends on the machine.
    assert random.Random((0 << 64) | 42).random() == 0.6394267984578837
    row = np.zeros(1000, dtype=np.float32)
    sampler = Sampler(SamplingParams(temperature=1.0, seed=42), 1000)
    assert [sampler.sample(row).token for _ in range(3)] == [639, 25, 275]


@pytest.mark.parametrize("temperature", [0.001, 1e-4])
def test_a_very_low_temperature_does_not_overflow(temperature: float, rng: np.random.Generator) -> None:
    row = (rng.standard_normal(VOCABULARY) * 30).astype(np.float32)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        for options in ({}, {"top_k": 10}, {"top_p": 0.9}):
            sampler = Sampler(SamplingParams(temperature=temperature, **options), VOCABULARY)
            assert sampler.sample(row).token == row.argmax()


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3}, {"logprobs": 2}])
def test_nan_logits_are_an_error_and_not_a_token(options: Any) -> None:
    row = np.zeros(VOCABULARY, dtype=np.float32)
    row[400] = np.nan
    with pytest.raises(BadLogits, match="not a number"):
        Sampler(SamplingParams(**options), VOCABULARY).sample(row)


def test_ruling_out_every_token_is_an_error() -> None:
    params = SamplingParams(logit_bias=dict.fromkeys(range(4), -math.inf))
    with pytest.raises(BadLogits, match="No token is left"):
        Sampler(params, 4).sample(np.zeros(4, dtype=np.float32))


def test_log_probabilities_are_those_of_the_raw_logits(rng: np.random.Generator) -> None:
    row = (rng.standard_normal(VOCABULARY) * 4).astype(np.float32)
    exact = row.astype(np.float64) - np.log(np.exp(row.astype(np.float64)).sum())
    sampled = Sampler(SamplingParams(temperature=2.0, top_k=3, logprobs=5, logit_bias={9: 50}), VOCABULARY).sample(row)
    assert sampled.token == 9
    assert sampled.logprobs is not None
    assert sampled.logprobs.logprob == pytest.approx(exact[9], abs=1e-5)
    assert [t.id for t in sampled.logprobs.top] == np.argsort(-exact)[:5].tolist()
    np.testing.assert_allclose([t.logprob for t in sampled.logprobs.top], np.sort(exact)[::-1][:5], atol=1e-5)
    assert log_probabilities(row, 0, 0).top == ()


def test_more_alternatives_than_tokens_are_all_tokens() -> None:
    assert len(log_probabilities(np.zeros(5, dtype=np.float32), 0, 50).top) == 5
