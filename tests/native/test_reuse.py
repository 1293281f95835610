"""An answer is the same, to the last bit, whether its prompt was read anew or the cache of an earlier one was used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import byte_llama
import numpy as np
import pytest
from levels import pytestmark  # noqa: F401  pytest reads the mark from here

import transom

PROMPT = 900
TURN = 100


def _answer(model: Any, prompt: list[int], sparsity: str) -> tuple[Any, int]:
    result = model.generate(prompt, max_new_tokens=4, temperature=0.0, ignore_eos=True, logprobs=3, sparsity=sparsity)
    (choice,) = result.choices
    numbers = [[(t.id, t.logprob) for t in token.top] for token in choice.logprobs]
    return (choice.token_ids, numbers), result.usage.cached_tokens


@pytest.mark.parametrize("precision", ["exact", "auto", "bf16"])
@pytest.mark.parametrize("quantization", ["F32", "Q8_0", "Q4_0"])
def test_a_prompt_read_again_gives_the_same_answer(
    precision: str, quantization: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    path = byte_llama.write_gguf(tmp_path / "m.gguf", rng, context=4096, quantization=quantization)
    options: dict[str, Any] = {
        "device": "cpu", "backend": "openvino_cpu", "precision": precision, "verify": "off",
        "cache": transom.Cache(tmp_path / "cache"),
    }  # fmt: skip
    prompt = rng.integers(0, 256, PROMPT).tolist()
    following = [*prompt, *rng.integers(0, 256, TURN + int(rng.integers(0, 70))).tolist()]
    with transom.load(path, **options) as model:
        first, cached = _answer(model, prompt, "off")
        assert cached == 0
        again, cached = _answer(model, prompt, "off")
        assert cached == (PROMPT - 8) // 64 * 64
        assert again == first
        turn, cached = _answer(model, following, "off")
        few = 0 < len(following) % 1024 < 8  # in its last step: read as it would have been
        assert cached >= (0 if few else PROMPT // 64 * 64)
    with transom.load(path, **options) as model:
        assert _answer(model, following, "off") == (turn, 0)


def test_sparse_attention_takes_up_whole_chunks(tmp_path: Path, rng: np.random.Generator) -> None:
    path = byte_llama.write_gguf(tmp_path / "m.gguf", rng, context=4096)
    prompt = rng.integers(0, 256, 2500).tolist()
    options: dict[str, Any] = {"device": "cpu", "verify": "off", "cache": transom.Cache(tmp_path / "cache")}
    with transom.load(path, **options) as model:
        first, cached = _answer(model, prompt, "0.5")
        assert cached == 0
        assert _answer(model, prompt, "0.6")[1] == 0
        assert _answer(model, prompt, "0.5") == (first, 2048)
