"""The tiny decoders are useful for checks: the feature of each variant changes its logits.

Draws: a feature that is left out changes logits by a tenth or so, and hundreds of tolerances less are asked for.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from transom.signature import Decoder
from transom.testing.bench import ReferenceOracle
from transom.testing.compare import PRECISIONS, normalized_error
from transom.testing.models import VARIANTS, tiny_decoder

NEUTRAL: dict[str, dict[str, Any]] = {
    "window": {"window": 0},
    "softcap": {"softcap": 0.0, "final_softcap": 6.0},
    "scale": {"scale": 0.0},
    "partial_rotary": {"rotated": 0},
}


def last_rows(seed: int, tokens: list[int], **form: Any) -> Any:
    return ReferenceOracle(tiny_decoder(np.random.default_rng(seed), **form)).logits(tokens)[-8:]


@pytest.mark.parametrize("variant", NEUTRAL)
def test_variant_without_its_feature_is_far_from_it(variant: str, seed: int) -> None:
    """Same seed, same weights: only the feature differs. It must stand out of the float32 tolerance by far."""
    tokens = np.random.default_rng(seed).integers(0, 61, 20).tolist()
    with_it = last_rows(seed, tokens, **VARIANTS[variant])
    without = last_rows(seed, tokens, **{**VARIANTS[variant], **NEUTRAL[variant]})
    assert normalized_error(without, with_it) > 10 * PRECISIONS["float32"].logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_of_common_size_and_depend_on_the_past(variant: str, rng: np.random.Generator) -> None:
    graph = tiny_decoder(rng, **VARIANTS[variant])
    oracle = ReferenceOracle(graph)
    tokens = rng.integers(0, 61, 12).tolist()
    logits = oracle.logits(tokens)
    assert np.isfinite(logits).all()
    assert 0.1 < logits.std() < 20
    other = [(tokens[0] + 7) % 61, *tokens[1:]]
    # the first token reaches the last row, through two layers, even where one of them has a short window
    assert normalized_error(oracle.logits(other)[-1], logits[-1]) > 1e-3


def test_one_seed_makes_one_model_and_two_make_two(seed: int) -> None:
    digests = [tiny_decoder(np.random.default_rng(n)).digest() for n in (seed, seed, seed + 1)]
    assert digests[0] == digests[1] != digests[2]


def test_signature_tells_sizes_and_windows(rng: np.random.Generator) -> None:
    decoder = tiny_decoder(rng, layers=3, window=5, value_dim=32).decoder
    assert isinstance(decoder, Decoder)
    assert [layer.sliding_window for layer in decoder.layers] == [5, 0, 5]
    assert decoder.layers[0].value_dim == 32
