"""`genai_config.json` and the part of the README say of a model what it is.

Draws: the numbers are only carried along; what is checked does not depend on them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from onnx_making import BACKEND, app_files, made

from transom.errors import OptionError
from transom.generation.params import resolve
from transom.testing.models import tiny_decoder
from transom.text.defaults import GenerationDefaults


def test_the_configuration_is_the_models(rng: np.random.Generator, tmp_path: Path) -> None:
    graph = tiny_decoder(rng, q_heads=6, kv_heads=2, layers=3)
    it = made(graph, tmp_path, context=96)
    told = GenerationDefaults(
        eos_ids=(5, 9), bos_id=1, sample=True, temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.1
    )
    config = json.loads(app_files(graph, it, told)["genai_config.json"])
    model, decoder, search = config["model"], config["model"]["decoder"], config["search"]
    assert (model["context_length"], search["max_length"], model["vocab_size"]) == (96, 96, 61)
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (1, [5, 9], 5)
    assert decoder["filename"] == "onnx/model.onnx"
    assert (tmp_path / decoder["filename"]).is_file()
    assert (decoder["num_attention_heads"], decoder["num_key_value_heads"], decoder["head_size"]) == (6, 2, 16)
    assert (decoder["num_hidden_layers"], decoder["hidden_size"]) == (3, 64)
    chosen = {key: search[key] for key in ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")}
    wanted = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.1}
    assert chosen == wanted


@pytest.mark.parametrize(("told", "sample"), [
    (GenerationDefaults(), False), (GenerationDefaults(temperature=0.6), True),
    (GenerationDefaults(temperature=0.0), False), (GenerationDefaults(sample=False, temperature=0.6), False),
    (GenerationDefaults(top_k=20, top_p=0.9), False), (GenerationDefaults(sample=True), True),
    (GenerationDefaults(sample=True, temperature=0.0), False),
])  # fmt: skip
def test_a_model_samples_where_its_authors_want_it(
    told: GenerationDefaults, sample: bool, rng: np.random.Generator, tmp_path: Path
) -> None:
    """As Transom itself does."""
    graph = tiny_decoder(rng, layers=1)
    config = json.loads(app_files(graph, made(graph, tmp_path), told)["genai_config.json"])
    assert config["search"]["do_sample"] == sample == (not resolve({}, defaults=told).greedy)
    assert "bos_token_id" not in config["model"]


def test_the_readme_says_what_is_missing(rng: np.random.Generator, tmp_path: Path) -> None:
    graph = tiny_decoder(rng)
    it = made(graph, tmp_path, precision="f16")
    told = GenerationDefaults(stop=("END",), suppress_ids=(7,), min_p=0.05, top_k=500)
    files = app_files(graph, it, told)
    assert json.loads(files["genai_config.json"])["search"]["top_k"] == 61, "GenAI refuses more than the vocabulary"
    text = files["README.md"].decode()
    assert "without a tokenizer" in text
    assert "'END'" in text
    assert "exclude some tokens from sampling, which GenAI cannot do: 7." in text
    assert "recommend `min_p` 0.05, for which GenAI has no option" in text
    assert "at most 160 tokens" in text
    assert "0.256 kB per token, 0.041 MB for 160" in text  # 2 layers, 2 KV heads, 32 columns of K and V, 2 bytes


def test_the_readme_has_the_lines_for_the_models_own_tokenizer(rng: np.random.Generator, tmp_path: Path) -> None:
    graph = tiny_decoder(rng, layers=1)
    it = made(graph, tmp_path)

    def page(**config: object) -> str:
        texts = {"tokenizer.json": b"{}", "tokenizer_config.json": json.dumps(config).encode()}
        return app_files(graph, it, GenerationDefaults(), texts)["README.md"].decode()

    chats, completes = page(chat_template="{{ messages }}"), page(add_bos_token=True, bos_token="<s>")
    for text in (chats, completes):
        assert text.count("```") == 10
        assert not re.search(r"^(chat|text)\|", text, re.MULTILINE)
    assert len(re.findall("(?i)apply_?chat_?template", chats)) == 5
    assert not re.search("(?i)apply_?chat_?template|messages", completes)
    assert completes.count('"The sky is blue because"') == 4
    assert "puts `<s>` before a text" in completes
    assert "before a text" not in chats


def test_variants_of_the_same_files_have_one_readme(rng: np.random.Generator, tmp_path: Path) -> None:
    graph = tiny_decoder(rng, layers=1)
    it = made(graph, tmp_path)
    one, other = (app_files(graph, it, GenerationDefaults(), name=name) for name in ("onnx-a", "onnx-b"))
    assert one == other


def test_a_long_context_takes_no_memory_before_it_is_asked_for(rng: np.random.Generator, tmp_path: Path) -> None:
    graph = tiny_decoder(rng, layers=1, context=9000)
    files = app_files(graph, made(graph, tmp_path), GenerationDefaults())
    config = json.loads(files["genai_config.json"])
    assert (config["model"]["context_length"], config["search"]["max_length"]) == (9000, 2048)
    assert "at most 9000 tokens long, prompt and answer together, and 2048 unless" in files["README.md"].decode()


def test_what_is_no_decoder_is_an_error() -> None:
    with pytest.raises(OptionError, match="this model is not one"):
        BACKEND.app_files({"decoder": None}, {"name": "onnx"}, {})
