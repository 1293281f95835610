"""Torch modules and transformers objects load: exported, or with their weights shared.

Draws: float32 sums in another order differ by about 1e-6 of their size; the tolerances are ten times that or more.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import add_tokenizer, assert_agrees, randomize, tiny

from transom.errors import SourceError
from transom.graph.builder import WEIGHT_META
from transom.reference.executor import Executor
from transom.sources.resolve import resolve
from transom.sources.torch import TorchModels, TorchSource


class Mixer(torch.nn.Module):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(8, 16), torch.nn.Linear(16, 4)
        self.norm, self.drop = torch.nn.LayerNorm(16), torch.nn.Dropout(0.5)

    def forward(self, x: Any, scale: Any) -> Any:
        hidden = self.norm(torch.nn.functional.gelu(self.first(x)))
        return self.second(self.drop(hidden)) * scale, hidden.mean(-1)


def test_a_module_with_example_inputs_runs_as_torch_runs_it(rng: np.random.Generator) -> None:
    module = Mixer()  # in training mode: exported in evaluation mode, and left as it was
    batch = torch.export.Dim.DYNAMIC
    spec = TorchSource(
        module,
        (torch.zeros(3, 8), torch.ones(1)),
        dynamic_shapes=({0: batch}, None),
        input_names=["x", "scale"],
        output_names=["y", "mean"],
    )
    source = resolve(spec)
    assert source.kind == "torch"
    model = source.open(spec)
    assert module.training
    model.graph.check()
    assert model.graph.decoder is None
    x = rng.standard_normal((5, 8)).astype(np.float32)
    got = Executor(model.graph).run({"x": x, "scale": np.float32([0.5])})
    with torch.no_grad():
        wanted = module.eval()(torch.from_numpy(x), torch.tensor([0.5]))
    assert np.abs(got["y"] - wanted[0].numpy()).max() < 1e-5
    assert np.abs(got["mean"] - wanted[1].numpy()).max() < 1e-5


def test_a_transformers_model_shares_its_weights(tmp_path: Path, rng: np.random.Generator) -> None:
    checkpoint = tiny("llama", tmp_path / "hf", rng)
    add_tokenizer(tmp_path / "hf")
    checkpoint.model.name_or_path = str(tmp_path / "hf")
    source = resolve(checkpoint.model)
    model = source.open(checkpoint.model)
    assert (source.kind, model.kind) == ("torch", "torch")
    assert model.tokenizer is not None
    assert model.generation.eos_ids == (257,)
    embedding = checkpoint.model.model.embed_tokens.weight
    arrays = [
        v.meta[WEIGHT_META].load() for v in model.graph.model.graph.initializers.values() if WEIGHT_META in v.meta
    ]
    assert any(a.ctypes.data == embedding.data_ptr() for a in arrays)
    assert_agrees(model.graph, checkpoint.model, rng)


def test_a_bfloat16_model_keeps_its_weights_in_bfloat16(tmp_path: Path, rng: np.random.Generator) -> None:
    checkpoint = tiny("qwen3", tmp_path, rng)
    half = copy.deepcopy(checkpoint.model).to(torch.bfloat16)
    with torch.no_grad():  # the same numbers in float32, without rounding the rotary frequencies too
        for parameter in checkpoint.model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    model = TorchModels().open(half)
    kinds = {str(v.dtype) for v in model.graph.model.graph.initializers.values() if WEIGHT_META in v.meta}
    assert kinds == {"BFLOAT16"}
    assert_agrees(model.graph, checkpoint.model, rng)


def test_another_transformers_decoder_is_exported_and_generates(rng: np.random.Generator) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=288, n_positions=64, n_embd=48, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    gpt2 = GPT2LMHeadModel(config).to(torch.float32).eval()
    randomize(gpt2, rng)
    model = TorchModels().open(gpt2)
    assert model.graph.decoder is not None
    assert (model.graph.decoder.family, model.graph.decoder.context) == ("gpt2", 64)
    assert any("exported by torch" in n for n in model.notes)
    assert model.generation.eos_ids == (2,)
    assert_agrees(model.graph, gpt2, rng)


def test_changed_weights_have_another_fingerprint() -> None:
    torch.manual_seed(0)
    module, source = Mixer(), TorchModels()
    before = source.fingerprint(TorchSource(module, (1,)))
    assert before == source.fingerprint(TorchSource(module, (2,)))
    with torch.no_grad():
        module.second.bias[0] += 1
    assert source.fingerprint(TorchSource(module, (1,))) != before


def test_what_cannot_be_exported_is_refused_with_the_reason() -> None:
    class Branching(torch.nn.Module):  # type: ignore[misc, name-defined]
        def forward(self, x: Any) -> Any:
            return x + 1 if x.sum() > 0 else x.numpy()

    cases: list[tuple[Any, str]] = [
        (TorchSource(Branching(), (torch.ones(2),)), "cannot export Branching"),
        (TorchSource(Mixer()), "needs example inputs"),
        (TorchSource("model", (1,)), "takes a torch.nn.Module, not a str"),
        (Mixer(), "cannot be loaded without example inputs"),
        (TorchSource(Mixer(), (torch.zeros(3, 8), torch.ones(1)), tokenizer_from="/no/such/folder"), "no folder"),
    ]
    for spec, words in cases:
        with pytest.raises(SourceError, match=words) as caught:
            TorchModels().open(spec)
        assert caught.value.fix


def test_a_model_without_memory_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    checkpoint = tiny("llama", tmp_path, rng)
    weight = checkpoint.model.model.embed_tokens
    weight.weight = torch.nn.Parameter(weight.weight.to(torch.float64))
    with pytest.raises(SourceError, match=r"embed_tokens\.weight .* torch\.float64"):
        TorchModels().open(checkpoint.model)
