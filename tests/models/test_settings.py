"""Settings of checkpoints: defaults and rotary scalings equal those of transformers, and old spellings work.

Draws: numbers come from the published formulas, within float32's rounding.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from checkpoints import tiny, write_gguf
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from transom.errors import SourceError
from transom.models import families, family_for_gguf, family_for_hf, gemma2
from transom.models.rope import rope_from_hf
from transom.models.tensors import Tensors, gguf_names
from transom.models.values import Values
from transom.sources import resolve
from transom.sources.gguf import GgufCheckpoint
from transom.sources.gguf_file import open_gguf

CONFIGS = {
    "llama": "LlamaConfig",
    "mistral": "MistralConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "gemma2": "Gemma2Config",
    "gemma3": "Gemma3TextConfig",
    "phi3": "Phi3Config",
}


@pytest.mark.parametrize("family", CONFIGS)
def test_the_defaults_are_those_of_transformers(family: str) -> None:
    defaults = importlib.import_module(f"transom.models.{family}").DEFAULTS
    fields = getattr(transformers, CONFIGS[family]).__dataclass_fields__
    theirs = {key: fields[key].default for key in defaults if key in fields}
    ours = {key: value for key, value in defaults.items() if key in fields}
    theirs = {key: False if key == "use_bidirectional_attention" and v is None else v for key, v in theirs.items()}
    assert ours == theirs
    assert set(defaults) - set(fields) <= {"sliding_window_pattern"}


def test_every_family_is_found_by_all_of_its_names() -> None:
    for family in families():
        for name in family.architectures:
            assert family_for_hf({"architectures": [name]}, "x") is family
        for name in family.model_types:
            assert family_for_hf({"model_type": name}, "x") is family
        for name in family.gguf:
            assert family_for_gguf(name) is family
    assert family_for_hf({"architectures": ["FooForCausalLM"], "model_type": "llama"}, "x") is None
    assert family_for_gguf("qwen3moe") is None


SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 2.5},
    {"rope_type": "dynamic", "factor": 4.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "attention_factor": 1.5},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512, "beta_fast": 16, "beta_slow": 2},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512, "truncate": False},
    {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 512,
        "mscale": 0.8,
        "mscale_all_dim": 0.5,
    },
    {
        "rope_type": "longrope",
        "original_max_position_embeddings": 512,
        "short_factor": [1.0 + i / 10 for i in range(16)],
        "long_factor": [1.0 + i for i in range(16)],
    },
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: str(s["rope_type"]))
@pytest.mark.parametrize("partial", [1.0, 0.5])
def test_rotary_scalings_equal_those_of_transformers(scaling: dict[str, Any], partial: float) -> None:
    table = {"rope_theta": 2e4, "partial_rotary_factor": partial, **scaling}
    if "short_factor" in table and partial != 1.0:
        table |= {"short_factor": table["short_factor"][:8], "long_factor": table["long_factor"][:8]}
    config = transformers.LlamaConfig(
        hidden_size=128, num_attention_heads=4, max_position_embeddings=2048, rope_parameters=dict(table)
    )
    settings = {"max_position_embeddings": 2048, "rope_parameters": table}
    rope = rope_from_hf(Values(settings, "config.json"), 32, None)
    frequencies, factor = ROPE_INIT_FUNCTIONS[table["rope_type"]](config)
    np.testing.assert_allclose(rope.frequencies, frequencies.numpy(), rtol=1e-5)
    assert rope.factor == pytest.approx(factor)
    assert rope.rotated == 32 * partial
    old = {
        "max_position_embeddings": 2048,
        "rope_theta": 2e4,
        "partial_rotary_factor": partial,
        "rope_scaling": {("type" if k == "rope_type" else k): v for k, v in scaling.items()},
    }
    if "short_factor" in scaling:
        old["rope_scaling"] |= {"short_factor": table["short_factor"], "long_factor": table["long_factor"]}
    before = rope_from_hf(Values(old, "config.json"), 32, None)
    np.testing.assert_array_equal(before.frequencies, rope.frequencies)
    assert (before.factor, before.rotated, before.context) == (rope.factor, rope.rotated, rope.context)


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        ({"rope_type": "polar"}, ("rope_type", "polar")),
        ({"rope_type": "linear"}, ("factor",)),
        ({"rope_type": "linear", "factor": "two"}, ("factor", "two")),
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}, ("short_factor",)),
        ({"rope_type": "mrope"}, ("mrope",)),
    ],
)
def test_scalings_that_cannot_be_honored_are_refused(scaling: dict[str, Any], words: tuple[str, ...]) -> None:
    settings = {"max_position_embeddings": 2048, "rope_scaling": scaling}
    with pytest.raises(SourceError) as caught:
        rope_from_hf(Values(settings, "config.json"), 32, None)
    assert all(word in str(caught.value) for word in words)


def test_gemma3_reads_the_old_and_the_new_spelling_alike() -> None:
    from transom.models import gemma3

    common = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": 512,
        "max_position_embeddings": 4096,
    }
    old = {
        **common,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window_pattern": 3,
    }
    new = transformers.Gemma3TextConfig(**old).to_dict()
    assert "full_attention" in new["rope_parameters"]
    a, b = (gemma3.from_hf(Values(c, "config.json"), None, None) for c in (old, new))  # type: ignore[arg-type]
    np.testing.assert_array_equal(a.rope.frequencies, b.rope.frequencies)
    np.testing.assert_array_equal(a.local_rope.frequencies, b.local_rope.frequencies)
    assert a.windows == b.windows == [512, 512, 0, 512, 512, 0]
    assert a.local == b.local


ODD: list[Any] = [0, -1, 1, 2, 3, 7, 1e30, 0.5, float("nan"), float("inf"), "x", "", True, [], [1], {}, {"a": 1}]


@pytest.mark.parametrize("family", CONFIGS)
def test_odd_values_are_refused_or_read_but_never_crash(family: str, tmp_path: Path, rng: np.random.Generator) -> None:
    tiny(family, tmp_path, rng)
    sound = json.loads((tmp_path / "config.json").read_text())
    keys = [k for k in sound if k not in ("architectures", "transformers_version", "dtype", "_name_or_path")]
    ways_out: list[str] = []
    for _ in range(120):
        config = dict(sound)
        key = keys[rng.integers(len(keys))]
        config[key] = ODD[rng.integers(len(ODD))]
        if rng.random() < 0.3:
            kind = ("linear", "dynamic", "yarn", "longrope", "llama3")[rng.integers(5)]
            table = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, "low_freq_factor": 1.0}
            table |= {"high_freq_factor": 4.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
            table[list(table)[rng.integers(1, len(table))]] = ODD[rng.integers(len(ODD))]
            config["rope_parameters"] = table
        (tmp_path / "config.json").write_text(json.dumps(config))
        try:
            resolve(tmp_path).open(tmp_path, context=[None, 16, 1000][rng.integers(3)])
        except SourceError as error:
            ways_out.append(error.fix)
        except Exception as error:
            raise AssertionError(f"{key}: {config[key]!r}, {config.get('rope_parameters')}: {error!r}") from error
    assert ways_out
    assert all(ways_out)


@pytest.mark.parametrize(
    ("sizes", "layers_of_27b", "published"),
    [
        ({"hidden": 4608, "heads": 32, "head_dim": 128, "layers": 46}, 46, 144),  # Gemma 2 27B
        ({"hidden": 3584, "heads": 16, "head_dim": 256, "layers": 42}, 46, 256),  # Gemma 2 9B
        ({"hidden": 5376, "heads": 32, "head_dim": 128, "layers": 62}, 62, 168),  # Gemma 3 27B
        ({"hidden": 3840, "heads": 16, "head_dim": 256, "layers": 48}, 62, 256),  # Gemma 3 12B
    ],
)
def test_a_gemma_file_that_does_not_say_its_scale_gets_that_of_the_published_config(
    sizes: dict[str, int], layers_of_27b: int, published: int
) -> None:
    scale = gemma2.scale_from_gguf(Values({}, "x.gguf", "gemma."), sizes, layers_of_27b)
    assert scale == pytest.approx(published**-0.5)
    said = Values({"gemma.attention.scale": 0.25}, "x.gguf", "gemma.")
    assert gemma2.scale_from_gguf(said, sizes, layers_of_27b) == 0.25


GGUF_KEYS = [
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.freq_base",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.attn_factor",
    "attention.sliding_window",
    "attention.sliding_window_pattern",
    "attention.scale",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "expert_count",
    "attention.causal",
    "rope.freq_base_swa",
]


@pytest.mark.parametrize("family", [f for f in CONFIGS if f != "mistral"])
def test_odd_gguf_metadata_is_refused_or_read_but_never_crashes(
    family: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    write_gguf(tiny(family, tmp_path / "hf", rng), tmp_path / "tiny.gguf")
    file = open_gguf(tmp_path / "tiny.gguf")
    found = next(f for f in families() if f.name == family)
    ways_out: list[str] = []
    for _ in range(200):
        metadata = dict(file.metadata)
        for key in rng.choice(GGUF_KEYS, 2):
            metadata[f"{family}.{key}"] = [*ODD, "yarn", "linear", 32][rng.integers(len(ODD) + 3)]
        tensors = Tensors(GgufCheckpoint(file), gguf_names(found.gguf_names))
        try:
            found.build(found.from_gguf(Values(metadata, "x.gguf", f"{family}."), tensors, None), tensors)
        except SourceError as error:
            ways_out.append(error.fix)
        except Exception as error:
            odd = {k: v for k, v in metadata.items() if v != file.metadata.get(k)}
            raise AssertionError(f"{odd}: {error!r}") from error
    assert ways_out
    assert all(ways_out)
