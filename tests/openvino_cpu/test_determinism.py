"""OpenVINO's own kernels repeat their bits, so that `deterministic=True` holds without the native library, too.

Draws: what is compared must be equal, whatever the numbers are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import byte_llama
import numpy as np
import pytest

import transom


def answers(model: Any, prompts: list[list[int]]) -> list[Any]:
    """Tokens and log-probabilities of generations that take turns, each with a seed of its own."""
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, "ignore_eos": True, "logprobs": 1}
    streams = [model.stream(prompt, seed=len(prompt), **options) for prompt in prompts]
    running = [iter(stream) for stream in streams]
    while running:
        running = [one for one in running if next(one, None) is not None]
    choices = [stream.result.choices[0] for stream in streams]
    return [(choice.token_ids, [token.logprob for token in choice.logprobs or ()]) for choice in choices]


@pytest.mark.usefixtures("through_openvino")
@pytest.mark.sweep(but=("Q4_1-fast",))
@pytest.mark.parametrize("precision", ["exact", "bf16", "fast"])
@pytest.mark.parametrize("quantization", ["F32", "Q4_1"])
def test_openvino_gives_a_request_the_same_bits_beside_others_if_it_is_asked_to(
    quantization: str, precision: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    path = byte_llama.write_gguf(tmp_path / "m.gguf", rng, context=512, quantization=quantization)
    prompts = [rng.integers(0, 256, int(n)).tolist() for n in (1, 40, 200, 333)]
    where: dict[str, Any] = {"device": "cpu", "backend": "openvino_cpu", "precision": precision, "verify": "off"}
    with transom.load(path, **where, cache=transom.Cache(tmp_path / "cache"), deterministic=True) as model:
        assert model.report.determinism.endswith("each sequence has steps of its own")
        alone = [answers(model, [prompt])[0] for prompt in prompts]
        assert answers(model, prompts) == alone
        assert answers(model, prompts[::-1]) == alone[::-1]
