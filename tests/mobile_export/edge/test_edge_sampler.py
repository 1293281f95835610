"""The runner's sampler draws the tokens that Transom's draws from the same logits and the same seed.

Draws: logits are drawn again until no token changes if the random numbers, `top_p` and `min_p` change by `NUDGE`, which
is more than the sums of float32 weights differ.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from transom.generation.params import SamplingParams
from transom.generation.sampling import Sampler
from transom.generation.stops import StopStrings

Call = Callable[..., Any]
NUDGE = 1e-6
"""More than weights in float32 are off by, relative to their sum: exponentials are off by two units in the last place,
1.2e-7 each, and Transom adds the weights of a block in float32, pairwise."""


@pytest.mark.parametrize("bits", [1, 31, 32, 33, 64])
def test_random_numbers_are_those_of_python(call: Call, rng: np.random.Generator, bits: int) -> None:
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
def test_tokens_are_those_of_transom(call: Call, rng: np.random.Generator, params: dict[str, float]) -> None:
    for _ in range(100):  # nine in ten are clear
        vocabulary, seed = int(rng.integers(50, 1500)), int(rng.integers(1 << 40))
        prompt = [int(token) for token in rng.integers(vocabulary, size=6)]
        rows = (rng.standard_normal((60, vocabulary)) * 3).astype(np.float32)
        rows[::7] = np.round(rows[::7])  # with many equal ones
        wanted = _sampled(rows, seed, prompt, params)
        nudges = itertools.product((-NUDGE, NUDGE), repeat=2)
        if all(_sampled(rows, seed, prompt, params, *nudge) == wanted for nudge in nudges):
            break
    else:
        pytest.fail("none of 100 draws was clear")
    assert call("sample", logits=rows.tolist(), seed=seed, prompt=prompt, **params) == wanted


def _sampled(
    rows: Any, seed: int, prompt: list[int], params: dict[str, float], random_nudge: float = 0, share_nudge: float = 0
) -> list[int]:
    """The tokens that Transom samples from rows of logits [tokens, vocabulary].

    Args:
        random_nudge: added to the random numbers.
        share_nudge: added to `top_p`, and to `min_p` relative to it.
    """
    changed = {**params}
    if "top_p" in params:
        changed["top_p"] += share_nudge
    if "min_p" in params:
        changed["min_p"] *= 1 + share_nudge
    sampler = Sampler(SamplingParams(seed=seed, **changed), rows.shape[1], prompt=prompt)  # type: ignore[arg-type]
    uniform = sampler._uniform
    sampler._uniform = lambda: min(max(uniform() + random_nudge, 0.0), 1 - 1e-9)
    found = []
    for row in rows:
        if best := sampler.top_k:
            order = np.argsort(-row, kind="stable")[:best]
            found.append(sampler.sample((order, row[order])).token)
        else:
            found.append(sampler.sample(row).token)
    return found


def test_suppressed_tokens_are_never_chosen(call: Call) -> None:
    assert call("sample", logits=[[1, 9, 8, 7]], seed=0, prompt=[], suppress_ids=[1, 2, 99, -1]) == [3]


def test_logits_without_a_possible_token_are_an_error(call: Call) -> None:
    with pytest.raises(RuntimeError, match="No token is left"):
        call("sample", logits=[[0.0]], seed=0, prompt=[], suppress_ids=[0])


def test_stop_strings_are_found_as_in_transom(call: Call, rng: np.random.Generator) -> None:
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
