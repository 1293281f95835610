"""Each value of a model's files, replaced by one of every other kind and size: it loads and computes, or one sentence
names the file and the value.

Draws: which damages are tried in a usual run. Each is to be met in the same way.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import byte_llama
import pytest
from checkpoints import add_tokenizer, reference_session, tiny
from structural_damage import KINDS, Damage, damages, kind_of, value_at

from transom.contract import Work
from transom.errors import TransomError
from transom.graph import Graph
from transom.sources import gguf, hf, resolve
from transom.sources.gguf_file import GgufFile, open_gguf
from transom.text.from_hf import tokenizer_from_hf

TEMPLATE = "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}"
TEXT_FILES: dict[str, Any] = {
    "special_tokens_map.json": {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}},
    "added_tokens.json": {"<pad>": 258},
    "chat_template.json": {"chat_template": TEMPLATE},
    "tokenizer_config.json": {
        "bos_token": "<s>", "pad_token": "<pad>", "chat_template": [{"name": "default", "template": TEMPLATE}],
        "added_tokens_decoder": {"257": {"content": "</s>", "special": True, "lstrip": False, "normalized": False}},
    },
    "generation_config.json": {
        "do_sample": True, "temperature": 0.5, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1,
        "max_new_tokens": 5, "eos_token_id": [257], "bos_token_id": 256, "stop_strings": ["x"], "suppress_tokens": [3],
    },
}  # fmt: skip
OWN_SETTINGS: dict[str, tuple[str, ...]] = {
    "llama": (),
    "gemma3": ("layer_types", "query_pre_attn_scalar", "rope_parameters", "sliding_window"),
    "phi3": ("original_max_position_embeddings", "rope_parameters", "sliding_window"),
    "qwen2": ("layer_types", "max_window_layers", "sliding_window", "use_sliding_window"),
}
"""What each family reads that Llama does not, or reads otherwise. Of Llama every setting is tried."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, shared_rng: Any) -> Callable[[str], Path]:
    """A tiny checkpoint of a family."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            tiny(family, made[family], shared_rng(f"the tiny {family} of wrong values"))
        return made[family]

    return make


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """The files of a tokenizer, of templates and of generation defaults."""
    add_tokenizer(tmp_path)
    for name, document in TEXT_FILES.items():
        (tmp_path / name).write_text(json.dumps(document))
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def compute(graph: Graph) -> None:
    session = reference_session(graph)
    session.step([Work(session.new_state(), [1, 2], "last")])


def open_texts(folder: Path) -> None:
    tokenizer, template, generation = hf._text(folder)
    assert tokenizer is not None
    tokenizer.decode(tokenizer.encode("ab"))
    if template is not None:
        template.require_valid()
    json.dumps(generation.to_json(), allow_nan=False)


def check(path: Path, tried: Iterator[Damage] | list[Damage], run: Callable[[], None], *, named: bool = True) -> int:
    """Run with each damage of a file. Returns how many were refused."""
    whole = path.read_text()
    refused = 0
    for damage in tried:
        path.write_text(json.dumps(damage.document))
        try:
            run()
        except TransomError as error:
            refused += 1
            said, keys = str(error), [str(key) for key in damage.place if isinstance(key, str)]
            wrong = damage.what in KINDS and damage.what != "null"
            if wrong and kind_of(value_at(damage.document, damage.place)) != kind_of(
                value_at(json.loads(whole), damage.place)
            ):
                assert path.name in said, f"{damage}: {said}"
                assert not named or not keys or any(key in said for key in keys), f"{damage}: {said}"
        except Exception as error:
            raise AssertionError(str(damage)) from error
    path.write_text(whole)
    return refused


def some(path: Path, dice: random.Random, count: int) -> list[Damage]:
    return dice.sample(list(damages(json.loads(path.read_text()))), count)


@pytest.mark.parametrize("name", TEXT_FILES)
def test_some_wrong_values_beside_a_tokenizer(texts: Path, dice: random.Random, name: str) -> None:
    check(texts / name, some(texts / name, dice, 15), lambda: open_texts(texts))


@pytest.mark.sweep
@pytest.mark.parametrize("name", TEXT_FILES)
def test_every_wrong_value_beside_a_tokenizer(texts: Path, name: str) -> None:
    assert check(texts / name, damages(TEXT_FILES[name]), lambda: open_texts(texts)) > 10


def tokenizer_damages(path: Path) -> Iterator[Damage]:
    for damage in damages(json.loads(path.read_text())):
        if damage.place[:2] != ("model", "vocab") or damage.place[2:] in ((), ("A",)):
            yield damage


def test_some_wrong_values_in_a_tokenizer(texts: Path, dice: random.Random) -> None:
    path = texts / "tokenizer.json"
    tried = dice.sample(list(tokenizer_damages(path)), 15)
    check(path, tried, lambda: _encode(texts), named=False)


@pytest.mark.sweep
def test_every_wrong_value_in_a_tokenizer(texts: Path) -> None:
    path = texts / "tokenizer.json"
    assert check(path, list(tokenizer_damages(path)), lambda: _encode(texts), named=False) > 100


def _encode(folder: Path) -> None:
    tokenizer = tokenizer_from_hf(folder)
    tokenizer.decode(tokenizer.encode("ab"))


def test_some_wrong_settings(folder: Any, dice: random.Random) -> None:
    path = folder("llama") / "config.json"
    check(path, some(path, dice, 20), lambda: compute(resolve(path.parent).open(path.parent).graph))


@pytest.mark.sweep
@pytest.mark.parametrize("family", OWN_SETTINGS)
def test_every_wrong_setting(folder: Any, family: str) -> None:
    path = folder(family) / "config.json"
    every, own = list(damages(json.loads(path.read_text()))), OWN_SETTINGS[family]
    tried = [d for d in every if family == "llama" or (d.place and d.place[0] in own)]
    assert check(path, tried, lambda: compute(resolve(path.parent).open(path.parent).graph)) > 20


def test_wrong_values_in_an_index_of_weights(folder: Any, tmp_path: Path) -> None:
    (tmp_path / "one.safetensors").write_bytes((folder("llama") / "model.safetensors").read_bytes())
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 5}, "weight_map": {"a": "one.safetensors"}}))
    assert check(path, list(damages(json.loads(path.read_text()))), lambda: _files(tmp_path)) > 20


def _files(folder: Path) -> None:
    hf.weight_files(folder)


def test_wrong_values_in_an_adapter(tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    path.write_text(json.dumps({"base_model_name_or_path": "a/b", "r": 8}))
    for damage in damages(json.loads(path.read_text())):
        path.write_text(json.dumps(damage.document))
        with pytest.raises(TransomError, match="is an adapter"):
            resolve(tmp_path)


# ----------------------------------------------------------------------------------------------------------------- GGUF

MORE = {
    "general.sampling.temp": 0.5, "general.sampling.top_k": 5, "general.license": "mit", "split.count": 1,
    "llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0, "llama.rope.dimension_count": 16,
    "llama.rope.scaling.original_context_length": 100, "llama.attention.sliding_window": 8, "llama.expert_count": 0,
    "llama.attention.key_length": 16, "llama.attention.causal": True, "tokenizer.ggml.suppress_tokens": [3],
    "tokenizer.ggml.scores": [0.0] * 262, "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.eot_token_id": 257,
    "tokenizer.chat_template.tool": "x",
}  # fmt: skip
"""Settings that the tiny file lacks."""
OF_GGUF = {
    **{k: v for k, v in KINDS.items() if k in ("text", "empty text", "true", "negative", "zero", "one", "fraction")},
    **{k: v for k, v in KINDS.items() if k in ("large", "infinity", "NaN", "list", "empty list")},
    "whole numbers": [1, 2], "numbers": [0.5], "flags": [True],
}  # fmt: skip
"""Values of the kinds that a GGUF file can hold."""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, shared_rng: Any) -> GgufFile:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return open_gguf(byte_llama.write_gguf(path, shared_rng("the tiny GGUF file of wrong values")))


def check_gguf(file: GgufFile, changes: list[tuple[str, str]], model: str, patch: pytest.MonkeyPatch) -> None:
    whole = {**file.metadata, **MORE, "tokenizer.ggml.model": model}
    told: dict[str, bool] = {}
    for key, what in changes:
        changed = GgufFile(file.paths, {**whole, key: OF_GGUF[what]}, file.tensors)
        patch.setattr(gguf, "open_gguf", lambda path, changed=changed: changed)
        try:
            if key.startswith("tokenizer"):
                tokenizer, template, generation = gguf._text(changed)
                if tokenizer is not None:
                    tokenizer.decode(tokenizer.encode("ab"))
                if template is not None:
                    template.require_valid()
                json.dumps(generation.to_json(), allow_nan=False)
            else:
                compute(gguf.GgufSource().open(file.paths[0]).graph)
        except TransomError as error:
            if type(OF_GGUF[what]) is not type(whole[key]):
                told[f"{key}: {what}"] = key in str(error)
        except Exception as error:
            raise AssertionError(f"{key}: {what}") from error
    assert [damage for damage, named in told.items() if not named] == []


def test_some_wrong_settings_of_a_gguf_file(
    file: GgufFile, dice: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = [(key, what) for key in {**file.metadata, **MORE} for what in OF_GGUF]
    check_gguf(file, dice.sample(every, 20), "gpt2", monkeypatch)


@pytest.mark.sweep
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_every_wrong_setting_of_a_gguf_file(file: GgufFile, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [k for k in {**file.metadata, **MORE} if model == "gpt2" or k.startswith("tokenizer")]
    check_gguf(file, [(key, what) for key in keys for what in OF_GGUF], model, monkeypatch)
