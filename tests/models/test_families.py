"""Every family agrees with transformers: prefill, cached decode and ragged batches, from a directory and from GGUF.

Draws: float32 sums in another order differ by about 1e-6 of their size; the tolerances are ten times that or more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import FAMILIES, assert_agrees, expected_logits, reference_session, tiny, write_gguf

from transom.contract import Work
from transom.sources import resolve

VARIANTS: list[tuple[str, str, dict[str, Any]]] = [
    *((family, "as it is", {}) for family in FAMILIES),
    ("llama", "tied embeddings", {"tie_word_embeddings": True}),
    ("llama", "biases, one group of heads", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    ("llama", "heads wider than hidden", {"head_dim": 32, "hidden_act": "gelu"}),
    ("llama", "linear", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 5e3}}),
    ("llama", "dynamic", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    (
        "llama",
        "llama3",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    (
        "llama",
        "yarn",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    ("mistral", "no window", {"sliding_window": None}),
    ("qwen2", "tied embeddings", {"tie_word_embeddings": True}),
    ("qwen2", "upper layers windowed", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    ("qwen3", "biases", {"attention_bias": True}),
    ("gemma2", "no soft caps", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    ("gemma3", "soft cap on the logits", {"final_logit_softcapping": 10.0}),
    ("phi3", "window, partial rotation", {"sliding_window": 6, "partial_rotary_factor": 0.5}),
]
NAMES = [f"{family} {name}" for family, name, _ in VARIANTS]


@pytest.mark.parametrize(("family", "name", "settings"), VARIANTS, ids=NAMES)
def test_a_directory_agrees_with_transformers(
    family: str, name: str, settings: dict[str, Any], tmp_path: Path, rng: np.random.Generator
) -> None:
    checkpoint = tiny(family, tmp_path / "model", rng, **settings)
    loaded = resolve(tmp_path / "model").open(tmp_path / "model")
    loaded.graph.check()
    assert loaded.kind == "hf"
    assert not [note for note in loaded.notes if "not used" in note]
    assert_agrees(loaded.graph, checkpoint.model, rng)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_checkpoints_stay_as_they_are_and_agree(
    dtype: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    import torch

    model = tiny("qwen2", tmp_path, rng).model
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path)
    exact = type(model).from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    loaded = resolve(tmp_path).open(tmp_path)
    types = {str(v.dtype) for v in loaded.graph.model.graph.initializers.values() if v.name.endswith(".weight")}
    assert types == {dtype.upper()}
    assert_agrees(loaded.graph, exact, rng)


GGUF_EXTRA = {"gemma3": {".attention.sliding_window_pattern": 2}}


@pytest.mark.parametrize("quantization", ["F32", "Q8_0"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gguf_file_agrees_with_transformers(
    family: str, quantization: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    checkpoint = tiny(family, tmp_path / "model", rng)
    path = tmp_path / "tiny.gguf"
    write_gguf(checkpoint, path, quantization, extra=GGUF_EXTRA.get(family))
    loaded = resolve(str(path)).open(str(path))
    loaded.graph.check()
    assert loaded.kind == "gguf"
    assert not [note for note in loaded.notes if "not used" in note]
    assert_agrees(loaded.graph, checkpoint.model, rng)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        (
            "qwen2",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 1e4,
                    "factor": 4.0,
                    "original_max_position_embeddings": 32,
                }
            },
        ),
        ("phi3", {"partial_rotary_factor": 0.5, "sliding_window": 6}),
    ],
    ids=["llama with biases, tied", "qwen2 with yarn", "phi3 partial"],
)
@pytest.mark.parametrize("quantization", ["Q4_0", "Q4_1"])
def test_gguf_variants_agree_with_transformers(
    family: str, settings: dict[str, Any], quantization: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    checkpoint = tiny(family, tmp_path / "model", rng, **settings)
    write_gguf(checkpoint, tmp_path / "tiny.gguf", quantization)
    loaded = resolve(tmp_path / "tiny.gguf").open(tmp_path / "tiny.gguf")
    assert_agrees(loaded.graph, checkpoint.model, rng)


LONGROPE = {
    "max_position_embeddings": 64,
    "original_max_position_embeddings": 16,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
        "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
    },
}


def test_longrope_uses_its_short_factors_unless_more_context_is_asked_for(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    checkpoint = tiny("phi3", tmp_path, rng, **LONGROPE)
    short = resolve(tmp_path).open(tmp_path)
    assert short.graph.decoder is not None
    assert short.graph.decoder.context == 16
    assert any("short rotary factors" in note for note in short.notes)
    assert_agrees(short.graph, checkpoint.model, rng, longest=13)


def test_longrope_uses_its_long_factors_when_more_context_is_asked_for(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    checkpoint = tiny("phi3", tmp_path, rng, **LONGROPE)
    long = resolve(tmp_path).open(tmp_path, context=64)
    assert long.graph.decoder is not None
    assert long.graph.decoder.context == 64
    prompt = rng.integers(0, 256, 24).tolist()
    session = reference_session(long.graph)
    got = session.step([Work(session.new_state(), prompt, "all")])[0]
    np.testing.assert_allclose(got, expected_logits(checkpoint.model, prompt), atol=1e-4)


def test_gguf_factor_tensors_are_honored(tmp_path: Path, rng: np.random.Generator) -> None:
    long = resolve_gguf_with_factors(tmp_path, rng, context=64)
    short = resolve_gguf_with_factors(tmp_path, rng, context=None)
    assert (long, short) == (64, 16)


def resolve_gguf_with_factors(folder: Path, rng: np.random.Generator, context: int | None) -> int:
    """Compare a phi3 GGUF file that has LongRoPE factors with transformers; returns the graph's context."""
    checkpoint = tiny("phi3", folder / "hf", rng, **LONGROPE)
    factors = {
        f"rope_factors_{which}.weight": np.array(LONGROPE["rope_parameters"][f"{which}_factor"], np.float32)
        for which in ("short", "long")
    }
    write_gguf(checkpoint, folder / "tiny.gguf", tensors=factors)
    graph = resolve(folder / "tiny.gguf").open(folder / "tiny.gguf", context=context).graph
    prompt = rng.integers(0, 256, 24 if context else 12).tolist()
    session = reference_session(graph)
    got = session.step([Work(session.new_state(), prompt, "all")])[0]
    np.testing.assert_allclose(got, expected_logits(checkpoint.model, prompt), atol=1e-4)
    assert graph.decoder is not None
    return graph.decoder.context


def test_llama3_factors_of_a_gguf_file_are_honored(tmp_path: Path, rng: np.random.Generator) -> None:
    rope = next(settings["rope_parameters"] for _, name, settings in VARIANTS if name == "llama3")
    checkpoint = tiny("llama", tmp_path / "hf", rng, rope_parameters=rope)
    plain = 5e5 ** (-np.arange(0, 16, 2) / 16)
    scaled = checkpoint.model.model.rotary_emb.inv_freq.double().numpy()
    factors = {"rope_freqs.weight": (plain / scaled).astype(np.float32)}  # as llama.cpp's converter writes them
    assert factors["rope_freqs.weight"].max() > 2
    write_gguf(checkpoint, tmp_path / "tiny.gguf", tensors=factors)
    assert_agrees(resolve(tmp_path / "tiny.gguf").open(tmp_path / "tiny.gguf").graph, checkpoint.model, rng)


def test_dynamic_scaling_stretches_when_more_context_is_asked_for(tmp_path: Path, rng: np.random.Generator) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    checkpoint = tiny("llama", tmp_path, rng, rope_parameters=rope, max_position_embeddings=16)
    loaded = resolve(tmp_path).open(tmp_path, context=24)
    prompt = rng.integers(0, 256, 24).tolist()  # transformers stretches for the length it sees, here the context
    session = reference_session(loaded.graph)
    got = session.step([Work(session.new_state(), prompt, "all")])[0]
    np.testing.assert_allclose(got, expected_logits(checkpoint.model, prompt), atol=1e-4)
    assert any("stretched" in note for note in loaded.notes)
