"""Samples one token from one row of logits: exact, in NumPy, and fast for vocabularies of 49K to 256K.

The order of operations is that of transformers (`GenerationMixin._get_logits_processor`):

1. guide mask, logit bias, repetition penalty, presence and frequency penalty;
2. temperature, top-k, top-p, min-p, each applied to the candidates that the previous ones left;
3. one draw by inverse transform: the token at which the cumulative probability passes a uniform random number.

Greedy sampling takes the argmax after step 1. Among equal logits the lowest id wins, also in top-k. Each sequence has
its own sampler and random numbers, so that its tokens do not depend on the rest of the batch.

The vocabulary is never sorted. Top-k first computes the maxima of interleaved groups, whose k-th largest is a lower
bound of the k-th largest logit (15 to 20 times as fast as `argpartition` at 128K); top-p is a quickselect by mass.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from transom.errors import TransomError, option
from transom.generation.params import SamplingParams
from transom.generation.results import TokenAlternative, TokenLogprobs
from transom.sessions.steps import top_k

if TYPE_CHECKING:
    from transom.generation.guided import Guide

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]

MOST_CANDIDATES = 256
"""Largest top-k that is requested from a session (`Work.top_k`) instead of whole rows."""

_WINDOW = np.float32(1e-3)
"""The nucleus is first searched among weights of at least this fraction of the largest."""
_SORTED_AT_ONCE = 512
_BLOCK = 512


class BadLogits(TransomError):
    """The logits allow no choice: they contain NaN, or every token is excluded."""


class Sampled(NamedTuple):
    """One chosen token."""

    token: int
    logprobs: TokenLogprobs | None
    complete: bool
    """Whether the guide allows no further token: the output is complete."""


class Sampler:
    """Chooses the tokens of one sequence.

    Args:
        params: the caller's options.
        vocabulary: size of a row of logits.
        prompt: ids to which the repetition penalty also applies.
        index: index of the answer among `params.n`; it selects the random numbers.
        guide: restricts the output; owned by this sampler.
    """

    def __init__(
        self,
        params: SamplingParams,
        vocabulary: int,
        *,
        prompt: Sequence[int] = (),
        index: int = 0,
        guide: Guide | None = None,
    ) -> None:
        self._params = params
        self._guide = guide
        self._greedy = params.greedy
        self._logprobs = params.logprobs
        self._uniform = _random_numbers(params.seed, index).random
        self._bias = _Bias(params.logit_bias, vocabulary) if params.logit_bias else None
        self._penalties = _Penalties(params, prompt, vocabulary) if _penalized(params) else None
        self._plain = guide is None and self._bias is None and self._penalties is None
        self.top_k = 0
        """The value for `Work.top_k`: only the k largest logits are needed; 0: the whole row."""
        if self._plain and self._logprobs is None:
            if self._greedy:
                self.top_k = 1
            elif 0 < params.top_k <= min(MOST_CANDIDATES, vocabulary):
                self.top_k = params.top_k

    def sample(self, logits: Any) -> Sampled:
        """Choose the next token and remember it.

        Args:
            logits: float32 [vocabulary], not changed; or, if `top_k` is above 0, a pair (int64 [k], float32 [k]) of the
                best ids and their logits, best first.

        Raises:
            BadLogits: the logits contain NaN, or no token is left to choose.
        """
        if isinstance(logits, tuple):
            return Sampled(self._from_best(*logits), None, False)
        row = np.asarray(logits, dtype=np.float32)
        if self._plain and self._greedy:
            token = _argmax(row)
        else:
            scores = row if self._plain else self._adjusted(row)
            token = _argmax(scores) if self._greedy else self._draw(scores)
        logprobs = None if self._logprobs is None else log_probabilities(row, token, self._logprobs)
        if self._penalties is not None:
            self._penalties.add(token)
        complete = self._guide is not None and self._guide.accept(token)
        return Sampled(token, logprobs, complete)

    def _adjusted(self, row: Floats) -> Floats:
        """Step 1: a copy of the row with mask, bias and penalties applied."""
        scores = row.copy()
        if self._guide is not None:
            self._guide.restrict(scores)
        if self._bias is not None:
            scores[self._bias.ids] += self._bias.values
        if self._penalties is not None:
            self._penalties.apply(scores)
        return scores

    def _from_best(self, ids: Any, values: Any) -> int:
        best = np.asarray(ids, dtype=np.int64)
        scores = np.asarray(values, dtype=np.float32)
        _check(float(scores[0]))
        if self._greedy:
            return int(best[0])
        weights = np.exp((scores - scores[0]) / np.float32(self._params.temperature))
        return int(best[_invert(self._filtered(weights), self._uniform())])

    def _draw(self, scores: Floats) -> int:
        """Steps 2 and 3: temperature, top-k, top-p, min-p and the draw."""
        params = self._params
        best = np.max(scores)
        _check(float(best))
        temperature = np.float32(params.temperature)
        if 0 < params.top_k < scores.size:
            ids = top_k(scores, params.top_k)
            weights = np.exp((scores[ids] - best) / temperature)
            return int(ids[_invert(self._filtered(weights), self._uniform())])
        # Subtracting the maximum first prevents overflow at a small temperature.
        weights = scores - best
        weights /= temperature
        np.exp(weights, out=weights)
        if params.top_p >= 1.0 and params.min_p <= 0.0:
            return _invert_blocks(weights, self._uniform())
        ids = _nucleus(weights, params.top_p, params.min_p)
        return int(ids[_invert_blocks(weights[ids], self._uniform())])

    def _filtered(self, weights: Floats) -> Floats:
        """Apply top-p and min-p to the candidates' weights, best first; returns the leading ones that remain."""
        if self._params.top_p < 1.0:
            weights = weights[: _reach(weights, self._params.top_p * float(weights.sum(dtype=np.float64)))]
        return _above(weights, self._params.min_p)


def log_probabilities(row: Floats, token: int, top: int) -> TokenLogprobs:
    """Natural log-probabilities of a token and of the `top` most likely ones; `row` is float32 logits [vocabulary]."""
    best = float(np.max(row))
    normalizer = best + math.log(float(np.exp(row - np.float32(best)).sum()))
    ids = top_k(row, min(top, row.size)) if top else ()
    alternatives = tuple(TokenAlternative(int(i), float(row[i]) - normalizer) for i in ids)
    return TokenLogprobs(token, float(row[token]) - normalizer, alternatives)


class _Bias:
    def __init__(self, bias: Any, vocabulary: int) -> None:
        self.ids = np.fromiter((i for i in bias if i < vocabulary), dtype=np.int64)
        self.values = np.array([bias[int(i)] for i in self.ids], dtype=np.float32)


class _Penalties:
    """The ids seen so far, in growing arrays, so that a step does not process the whole vocabulary."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int], vocabulary: int) -> None:
        self._params = params
        seen = np.unique(np.asarray(prompt, dtype=np.int64)) if params.repetition_penalty != 1.0 else np.empty(0, int)
        self._place = {int(token): i for i, token in enumerate(seen)}
        self._ids = np.zeros(max(256, 2 * seen.size), dtype=np.int64)
        self._ids[: seen.size] = seen
        self._counts = np.zeros(self._ids.size, dtype=np.float32)
        """How often each id occurs in the output; 0 for ids that occur only in the prompt."""

    def add(self, token: int) -> None:
        place = self._place.setdefault(token, len(self._place))
        if place == self._ids.size:
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[place] = token
        self._counts[place] += 1

    def apply(self, scores: Floats) -> None:
        used = len(self._place)
        if not used:
            return
        ids, counts = self._ids[:used], self._counts[:used]
        values = scores[ids]
        penalty = np.float32(self._params.repetition_penalty)
        if penalty != 1.0:
            values = np.where(values < 0, values * penalty, values / penalty)
        if self._params.frequency_penalty:
            values -= np.float32(self._params.frequency_penalty) * counts
        if self._params.presence_penalty:
            values -= np.float32(self._params.presence_penalty) * (counts > 0)
        scores[ids] = values


def _penalized(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def _random_numbers(seed: int | None, index: int) -> random.Random:
    # The standard library's Mersenne Twister: Python guarantees the same numbers for the same seed.
    return random.Random() if seed is None else random.Random((index << 64) | seed)


def _check(best: float) -> None:
    if math.isnan(best):
        raise BadLogits(
            "The model's output is not a number (NaN)",
            "Its weights may be damaged, or its precision too low: "
            f"load it with {option('verify', 'always')} to find out.",
        )
    if best == -math.inf:
        raise BadLogits("No token is left to choose from", "Relax logit_bias or the guide.")


def _argmax(scores: Floats) -> int:
    token = int(np.argmax(scores))
    _check(float(scores[token]))
    return token


def _above(weights: Floats, share: float) -> Floats:
    """The leading weights of at least `share` times the first. The weights are sorted in descending order."""
    if share <= 0.0:
        return weights
    return weights[: max(1, int(np.searchsorted(-weights, -share * float(weights[0]), side="right")))]


def _reach(weights: Floats, mass: float) -> int:
    """How many leading weights are needed to reach `mass`: at least one."""
    cumulative = np.cumsum(weights, dtype=np.float64)
    return min(int(np.searchsorted(cumulative, mass, side="left")) + 1, weights.size)


def _nucleus(weights: Floats, top_p: float, min_p: float) -> Ids:
    """The ids, ascending, that remain after top-p and min-p. `weights`: unnormalized probabilities, the largest is
    1."""
    if top_p >= 1.0:
        return np.flatnonzero(weights >= np.float32(min_p))
    smallest, ties = _smallest_of_nucleus(weights, top_p * float(weights.sum(dtype=np.float64)))
    ids = np.flatnonzero(weights >= smallest)
    at_edge = np.flatnonzero(weights[ids] == smallest)
    if at_edge.size > ties:
        ids = np.delete(ids, at_edge[ties:])
    return ids[weights[ids] >= np.float32(min_p)] if min_p > 0.0 else ids


def _smallest_of_nucleus(weights: Floats, mass: float) -> tuple[np.float32, int]:
    """The smallest weight in the nucleus (the fewest largest weights that reach `mass`), and its count in the nucleus.

    A quickselect by mass: each round halves the candidates, so that the vocabulary is not sorted.
    """
    above = 0.0
    rest = weights[weights >= _WINDOW]
    if float(rest.sum(dtype=np.float64)) < mass:
        rest = weights
    while rest.size > _SORTED_AT_ONCE:
        sample = np.sort(rest[:: rest.size // 64])
        pivot = sample[sample.size // 2]
        upper = rest[np.flatnonzero(rest >= pivot)]
        if upper.size == rest.size:
            break
        within = above + float(upper.sum(dtype=np.float64))
        if within >= mass:
            rest = upper
        else:
            above = within
            rest = rest[np.flatnonzero(rest < pivot)]
    ordered = np.sort(rest)[::-1]
    reach = _reach(ordered, mass - above)
    smallest = ordered[reach - 1]
    return smallest, int((ordered[:reach] == smallest).sum())


def _invert(weights: Floats, uniform: float) -> int:
    """The first index at which the cumulative weight passes the fraction `uniform` of the total."""
    cumulative = np.cumsum(weights, dtype=np.float64)
    place = int(np.searchsorted(cumulative, uniform * float(cumulative[-1]), side="right"))
    # Rounding may put the target past the end; take the largest weight then.
    return place if place < weights.size else int(np.argmax(weights))


def _invert_blocks(weights: Floats, uniform: float) -> int:
    """`_invert` for a whole vocabulary: accumulates sums of blocks, then one block, instead of all weights."""
    blocks = weights.size // _BLOCK
    if blocks < 2:
        return _invert(weights, uniform)
    edge = blocks * _BLOCK
    sums = np.empty(blocks + 1, dtype=np.float64)
    sums[:blocks] = weights[:edge].reshape(blocks, _BLOCK).sum(axis=1)
    sums[blocks] = weights[edge:].sum()
    ends = np.cumsum(sums)
    target = uniform * float(ends[-1])
    block = min(int(np.searchsorted(ends, target, side="right")), blocks)
    if sums[block] == 0.0:
        return int(np.argmax(weights))
    inside = weights[block * _BLOCK : (block + 1) * _BLOCK] if block < blocks else weights[edge:]
    before = float(ends[block - 1]) if block else 0.0
    return block * _BLOCK + _invert(inside, min(max((target - before) / float(sums[block]), 0.0), 1.0))
