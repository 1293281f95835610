"""Properties of every family's graph: lazy weights, unique node names, equal digests for equal models.

Draws: float32 sums in another order differ by about 1e-6 of their size; the tolerances are ten times that or more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import FAMILIES, tiny, write_gguf

from transom.graph.builder import WEIGHT_META
from transom.graph.weights import Dense, Weight
from transom.models import families
from transom.models.tensors import Tensors
from transom.models.values import Values
from transom.sources import resolve
from transom.sources.hf import HfSource


class Counting:
    """A checkpoint of synthetic tensors that counts reads."""

    where = "made up"
    weights_hash = "made up"

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes, self.reads = shapes, 0

    def names(self) -> list[str]:
        return list(self.shapes)

    def find(self, name: str) -> Weight | None:
        def load() -> np.ndarray[Any, Any]:
            self.reads += 1
            return np.zeros(self.shapes[name], np.float32)

        return Dense(self.shapes[name], "float32", load) if name in self.shapes else None


@pytest.mark.parametrize("family", families(), ids=lambda f: f.name)
def test_building_a_graph_reads_no_weights(family: Any, tmp_path: Path, rng: np.random.Generator) -> None:
    model = tiny(family.name, tmp_path, rng)
    checkpoint = Counting({name: tuple(p.shape) for name, p in model.model.state_dict().items()})
    tensors = Tensors(checkpoint)
    graph = family.build(family.from_hf(Values(model.config.to_dict(), "config.json"), tensors, None), tensors)
    graph.check()
    assert checkpoint.reads == 0
    assert [n for n in tensors.unused() if n != "lm_head.weight"] == []
    weights = {id(v.meta[WEIGHT_META]): v.meta[WEIGHT_META] for v in graph.model.graph.initializers.values() if v.meta}
    for weight in weights.values():
        weight.load()
    assert checkpoint.reads > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_signature_tells_sizes_and_windows(family: str, tmp_path: Path, rng: np.random.Generator) -> None:
    model = tiny(family, tmp_path, rng)
    decoder = resolve(tmp_path).open(tmp_path).graph.decoder
    assert decoder is not None
    config = model.config
    assert decoder.family == family
    assert decoder.vocabulary == config.vocab_size
    assert decoder.hidden == config.hidden_size
    assert decoder.context == config.max_position_embeddings
    assert len(decoder.layers) == config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None) or 0
    assert [c.sliding_window for c in decoder.layers] == [window if k == "sliding_attention" else 0 for k in kinds]
    assert decoder.parameters == sum(p.numel() for p in model.model.parameters())
    assert decoder.weight_bytes == 4 * decoder.parameters


def test_node_names_are_unique_and_say_their_layer(tmp_path: Path, rng: np.random.Generator) -> None:
    tiny("gemma3", tmp_path, rng)
    names = [str(node.name) for node in resolve(tmp_path).open(tmp_path).graph.nodes()]
    assert len(set(names)) == len(names)
    assert {"layers.0.attention", "layers.2.q_norm", "layers.1.mlp.gated", "lm_head"} <= set(names)


def test_equal_models_have_equal_digests_and_other_weights_another(tmp_path: Path, rng: np.random.Generator) -> None:
    checkpoint = tiny("llama", tmp_path / "a", rng)
    write_gguf(checkpoint, tmp_path / "a.gguf")
    tiny("llama", tmp_path / "b", rng)

    def digest(path: Path) -> str:
        return resolve(path).open(path).graph.digest()

    assert digest(tmp_path / "a") == digest(tmp_path / "a")
    assert digest(tmp_path / "a") != digest(tmp_path / "b")
    assert digest(tmp_path / "a.gguf") == digest(tmp_path / "a.gguf")


def test_tied_embeddings_are_one_weight(tmp_path: Path, rng: np.random.Generator) -> None:
    tiny("qwen2", tmp_path, rng, tie_word_embeddings=True)
    names = list(resolve(tmp_path).open(tmp_path).graph.model.graph.initializers)
    assert "embedding.weight" in names
    assert not [name for name in names if name.startswith("lm_head")]


def test_quantized_weights_stay_quantized_in_the_graph(tmp_path: Path, rng: np.random.Generator) -> None:
    checkpoint = tiny("llama", tmp_path / "hf", rng)
    write_gguf(checkpoint, tmp_path / "q.gguf", "Q4_0")
    graph = resolve(tmp_path / "q.gguf").open(tmp_path / "q.gguf").graph
    types = {str(v.dtype) for v in graph.model.graph.initializers.values() if v.name.endswith(".quants")}
    assert types == {"INT4"}
    assert sum(node.op_type == "DequantizeLinear" for node in graph.nodes()) == 2 * 7 + 2


def test_a_model_that_also_reads_images_loads_as_a_text_model(tmp_path: Path, rng: np.random.Generator) -> None:
    import transformers
    from checkpoints import FAMILIES as SETTINGS
    from checkpoints import SIZES, assert_agrees, randomize

    text = {**SIZES, **SETTINGS["gemma3"]}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    config._attn_implementation = "eager"
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    randomize(model, rng)
    model.save_pretrained(tmp_path)
    loaded = HfSource().open(tmp_path)
    assert any("images" in note for note in loaded.notes)
    assert not [note for note in loaded.notes if "not used" in note]
    assert_agrees(loaded.graph, model, rng)
