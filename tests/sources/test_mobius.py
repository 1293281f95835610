"""Architectures outside our own families, built by mobius-onnx, agree with transformers.

Draws: float32 sums in another order differ by about 1e-6 of their size; the tolerances are ten times that or more.
"""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import SIZES, add_tokenizer, assert_agrees, randomize

from transom.errors import MissingExtra, SourceError
from transom.evaluation.verify import oracle_for, verify_session
from transom.signature import Decoder, LayerCache
from transom.sources import mobius
from transom.sources.resolve import resolve

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.2,
        "logits_scaling": 2.0,
    },
    "olmo2": {},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]},
    "arcee": {},
    "mixtral": {"sliding_window": None, **EXPERTS},
}


def checkpoint(kind: str, folder: Path, rng: np.random.Generator, dtype: Any = torch.float32, **settings: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **{**SIZES, **settings}, attn_implementation="eager")
    model = AutoModelForCausalLM.from_config(config).to(torch.float32).eval()
    randomize(model, rng)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    copy.deepcopy(model).to(dtype).save_pretrained(folder)
    add_tokenizer(folder)
    return model


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_that_mobius_builds_agrees_with_transformers(
    kind: str, tmp_path: Path, rng: np.random.Generator, seed: int
) -> None:
    model = checkpoint(kind, tmp_path, rng, **FAMILIES[kind])
    source = resolve(tmp_path)
    assert source.kind == "mobius"
    found = source.open(tmp_path)
    found.graph.check()
    assert found.graph.decoder is not None
    assert (found.graph.decoder.family, found.graph.decoder.context) == (kind, 128)
    assert found.tokenizer is not None
    assert found.generation.eos_ids == (257,)
    assert_agrees(found.graph, model, rng)

    from checkpoints import reference_session

    verified = verify_session(
        reference_session(found.graph), oracle_for(tmp_path), vocabulary=288, context=128, seed=seed, longest=24
    )
    assert verified.agrees, str(verified)
    assert "transformers" in verified.oracle


def test_a_bfloat16_checkpoint_keeps_its_weights_and_computes_in_float32(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    model = checkpoint("granite", tmp_path, rng, torch.bfloat16)
    found = resolve(tmp_path).open(tmp_path)
    large = {str(v.dtype) for v in found.graph.model.graph.initializers.values() if (v.const_value.size or 0) > 4096}  # type: ignore[union-attr]
    assert "BFLOAT16" in large
    assert_agrees(found.graph, model, rng)


def config_only(folder: Path, **settings: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({"architectures": ["OtherForCausalLM"], **settings}))
    return folder


def test_without_the_extra_the_command_that_installs_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = config_only(tmp_path, model_type="granite")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "mobius" else find(name, *a))
    assert not mobius.MobiusSource().matches(folder)
    with pytest.raises(MissingExtra, match=r"pip install 'transom\[families\]'"):
        mobius.MobiusSource().open(folder)
    (folder / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")
    with pytest.raises(MissingExtra, match=r"transom\[families\]"):
        resolve(folder).open(folder)


@pytest.mark.parametrize(("kind", "fix"), [("cohere", "from_pretrained"), ("deepseek_v3", "Choose a model")])
def test_what_mobius_builds_wrongly_is_refused(kind: str, fix: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=f'"{kind}", but wrongly') as caught:
        mobius.MobiusSource().open(config_only(tmp_path, model_type=kind))
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    ("kind", "architecture", "known"),
    [
        ("granite", "OtherForCausalLM", "GraniteForCausalLM"),
        ("olmo2", "GraniteForCausalLM", "Olmo2ForCausalLM"),
        ("llama", "ChangedForCausalLM", "LlamaForCausalLM"),
    ],
)
def test_a_config_whose_architecture_is_not_its_model_type_s_is_refused(
    kind: str, architecture: str, known: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    checkpoint(kind, tmp_path, rng, **FAMILIES.get(kind, {}))
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "architectures": [architecture]}))
    source = resolve(tmp_path)
    assert source.kind == "mobius"
    with pytest.raises(SourceError, match=f'{architecture} and the model_type "{kind}"') as caught:
        source.open(tmp_path)
    assert f"a {known}, write that name into architectures" in caught.value.fix
    assert "export the model to ONNX" in caught.value.fix
    file.write_text(json.dumps({**config, "architectures": [known]}))  # what it says to do
    assert resolve(tmp_path).open(tmp_path).graph.decoder is not None


def test_a_config_that_names_no_architecture_goes_by_its_model_type(tmp_path: Path, rng: np.random.Generator) -> None:
    model = checkpoint("granite", tmp_path, rng)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    del config["architectures"]
    file.write_text(json.dumps(config))
    assert_agrees(resolve(tmp_path).open(tmp_path).graph, model, rng)


def test_an_unknown_architecture_is_reported(tmp_path: Path) -> None:
    folder = config_only(tmp_path, model_type="granito")
    (folder / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")
    with pytest.raises(SourceError, match='does not know the architecture "OtherForCausalLM"') as caught:
        resolve(folder).open(folder)
    assert 'Did you mean "granite"?' in caught.value.fix


def test_missing_tensors_are_named(tmp_path: Path, rng: np.random.Generator) -> None:
    from safetensors.torch import load_file, save_file

    checkpoint("olmo2", tmp_path, rng)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(SourceError, match=r"lacks weights: .*up_proj"):
        resolve(tmp_path).open(tmp_path)


def test_a_window_that_the_graph_lacks_is_refused(tmp_path: Path) -> None:
    folder = config_only(tmp_path, model_type="starcoder2", sliding_window=4, num_hidden_layers=1)
    decoder = Decoder("starcoder2", 288, 64, 128, (LayerCache(4, 2, 16, 16, 0),))
    with pytest.raises(SourceError, match="sliding window of no tokens in layer 0; the checkpoint says 4"):
        mobius.check_windows(decoder, folder, "starcoder2")
    mobius.check_windows(Decoder("starcoder2", 288, 64, 4, decoder.layers), folder, "starcoder2")  # never that long
