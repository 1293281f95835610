"""The runner's sampler draws the tokens that Transom's draws from the same logits and the same seed.

Draws: the random numbers are equal, and sums of probabilities differ by 1e-7 at most: a token falls otherwise once in
a million.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from transom.generation.params import SamplingParams
from transom.generation.sampling import Sampler
from transom.generation.stops import StopStrings

Call = Callable[..., Any]


@pytest.mark.parametrize("bits", [1, 31, 32, 33, 64])
def test_random_numbers_are_pythons(call: Call, rng: np.random.Generator, bits: int) -> None:
    seed = int(rng.integers(1 << (bits - 1), (1 << bits) - 1, dtype=np.uint64)) if bits > 1 else 0
    numbers = random.Random(seed)
    assert call("random", seed=seed, count=2000) == [numbers.random() for _ in range(2000)]


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.8},
        {"temperature": 1.3, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.7},
        {"temperature": 0.9, "min_p": 0.05},
        {"temperature": 1.1, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
        {"temperature": 0.7, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": -0.4},
        {"repetition_penalty": 1.8, "frequency_penalty": 0.7},
    ],
    ids=str,
)
def test_tokens_are_transoms(call: Call, rng: np.random.Generator, params: dict[str, float]) -> None:
    vocabulary, seed = int(rng.integers(50, 1500)), int(rng.integers(1 << 40))
    prompt = [int(token) for token in rng.integers(vocabulary, size=6)]
    rows = (rng.standard_normal((60, vocabulary)) * 3).astype(np.float32)
    rows[::7] = np.round(rows[::7])  # with many equal ones
    sampler = Sampler(SamplingParams(seed=seed, **params), vocabulary, prompt=prompt)  # type: ignore[arg-type]
    wanted = []
    for row in rows:
        best = sampler.top_k
        if best:
            order = np.argsort(-row, kind="stable")[:best]
            wanted.append(sampler.sample((order, row[order])).token)
        else:
            wanted.append(sampler.sample(row).token)
    found = call("sample", logits=rows.tolist(), seed=seed, prompt=prompt, **params)
    # A sum that is rounded elsewhere may move one draw in a million
    assert found == wanted


def test_some_tokens_are_never_chosen(call: Call) -> None:
    assert call("sample", logits=[[1, 9, 8, 7]], seed=0, prompt=[], suppress_ids=[1, 2, 99, -1]) == [3]


def test_logits_that_are_no_numbers(call: Call) -> None:
    with pytest.raises(RuntimeError, match="No token is left"):
        call("sample", logits=[[0.0]], seed=0, prompt=[], suppress_ids=[0])


def test_stop_strings_are_transoms(call: Call, rng: np.random.Generator) -> None:
    for _ in range(60):
        stops = ["".join(rng.choice(list("ab"), size=int(rng.integers(1, 5)))) for _ in range(int(rng.integers(1, 4)))]
        pieces = ["".join(rng.choice(list("abc"), size=int(rng.integers(0, 4)))) for _ in range(12)]
        ours, shown, found = StopStrings(stops), "", False
        for piece in pieces:
            released = ours.push(piece)
            shown += released.text
            if released.stop is not None:
                found = True
                break
        else:
            shown += ours.finish()
        assert call("stop", stops=stops, pieces=pieces) == {"shown": shown, "found": found}
