"""Generation defaults: end tokens, recommended sampling, and invalid values."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from transom.errors import SourceError
from transom.text import GenerationDefaults, Tokenizer
from transom.text.defaults import defaults_from_gguf, defaults_from_hf, end_ids
from transom.text.from_gguf import tokenizer_from_gguf
from transom.typed import WrongType

Make = Callable[..., Any]
PATTERN = r" ?\p{L}+|\s+|."


@pytest.fixture
def with_tokens(train_byte_level: Make, gguf_metadata: Make) -> Callable[..., Tokenizer]:
    """A tokenizer with these tokens appended, and the role ids of keyword arguments."""

    def make(*tokens: str, kind: int = 3, **ids: int) -> Tokenizer:
        metadata = gguf_metadata(train_byte_level(PATTERN, 400, ()), "dbrx", **ids)
        metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], *tokens]
        metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], *[kind] * len(tokens)]
        return tokenizer_from_gguf(metadata)

    return make


def test_smollm2_ends_at_its_end_of_turn_and_its_end_of_text(smollm2: dict[str, Any]) -> None:
    defaults = defaults_from_gguf(smollm2, tokenizer_from_gguf(smollm2))
    assert defaults == GenerationDefaults(eos_ids=(0, 2), bos_id=1, pad_id=2)


@pytest.mark.parametrize(
    "marker", ["<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>", "<|endoftext|>"]
)
def test_end_markers_of_the_vocabulary_end_generation(marker: str, with_tokens: Make) -> None:
    tokenizer = with_tokens("</s>", marker, eos_token_id=400)
    assert end_ids(tokenizer) == {400, 401}
    assert defaults_from_hf({}, {}, tokenizer).eos_ids == (400, 401)


def test_a_marker_that_is_ordinary_text_does_not_end_generation(with_tokens: Make) -> None:
    assert end_ids(with_tokens("<|im_end|>", kind=1)) == set()


def test_the_end_of_one_message_of_several_does_not_end_generation(with_tokens: Make) -> None:
    tokenizer = with_tokens("<|end|>", "<|return|>", "<|call|>")
    assert end_ids(tokenizer) == {401, 402}


def test_the_named_end_of_turn_of_a_gguf_is_taken(with_tokens: Make) -> None:
    tokenizer = with_tokens("</s>", "<x>", eos_token_id=400)
    assert defaults_from_gguf({"tokenizer.ggml.eot_token_id": 401}, tokenizer).eos_ids == (400, 401)
    assert defaults_from_gguf({"tokenizer.ggml.eot_token_id": 0xFFFFFFFF}, tokenizer).eos_ids == (400,)


def test_sampling_of_a_gguf_is_read() -> None:
    metadata = {
        "general.sampling.temp": 0.7,
        "general.sampling.top_k": 20,
        "general.sampling.top_p": 0.8,
        "general.sampling.min_p": 0.05,
        "general.sampling.penalty_repeat": 1.1,
        "tokenizer.ggml.suppress_tokens": [3, 4],
    }
    defaults = defaults_from_gguf(metadata, None)
    assert (defaults.temperature, defaults.top_k, defaults.top_p, defaults.min_p) == (0.7, 20, 0.8, 0.05)
    assert (defaults.repetition_penalty, defaults.suppress_ids) == (1.1, (3, 4))


def test_generation_config_rules_over_config() -> None:
    config = {"eos_token_id": 5, "bos_token_id": 6, "text_config": {"pad_token_id": 7, "eos_token_id": 9}}
    assert defaults_from_hf({}, config, None) == GenerationDefaults(eos_ids=(5,), bos_id=6, pad_id=7)
    generation = {"eos_token_id": [2, 1], "stop_strings": "END", "max_new_tokens": 9, "top_k": -1, "do_sample": False}
    defaults = defaults_from_hf(generation, config, None)
    assert defaults.eos_ids == (1, 2)
    assert (defaults.stop, defaults.max_new_tokens, defaults.top_k, defaults.sample) == (("END",), 9, 0, False)
    assert defaults_from_hf({}, {"text_config": {"eos_token_id": [1]}}, None).eos_ids == (1,)


@pytest.mark.parametrize(("said", "kept"), [("", ()), ([""], ()), (["", "END"], ("END",)), (None, ())])
def test_an_empty_stop_string_stops_nothing(said: Any, kept: tuple[str, ...]) -> None:
    assert defaults_from_hf({"stop_strings": said}, {}, None).stop == kept


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -1),
        ("temperature", "hot"),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", True),
        ("top_p", 1.5),
        ("top_k", 2.5),
        ("top_k", float("nan")),
        ("top_k", "many"),
        ("do_sample", 1),
        ("eos_token_id", "</s>"),
        ("eos_token_id", [1, None]),
        ("eos_token_id", 1.5),
    ],
)
def test_values_that_cannot_be_are_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(SourceError) as caught:
        defaults_from_hf({key: value}, {}, None)
    assert key in caught.value.cause
    assert caught.value.fix


def test_defaults_survive_the_cache() -> None:
    defaults = GenerationDefaults((1, 2), 3, None, True, 0.5, 4, 0.9, stop=("a", "b"), suppress_ids=(7,))
    assert GenerationDefaults.from_json(json.loads(json.dumps(defaults.to_json()))) == defaults
    with pytest.raises(WrongType, match="new is not known"):
        GenerationDefaults.from_json({"new": 1})


@pytest.mark.parametrize(
    "data",
    [
        {"eos_ids": 3}, {"eos_ids": ["3"]}, {"eos_ids": [True]}, {"bos_id": 1.0}, {"sample": 1}, {"stop": "END"},
        {"temperature": "hot"}, {"top_k": False}, {"suppress_ids": [None]}, {"max_new_tokens": [1]},
    ],
    ids=str,
)  # fmt: skip
def test_values_of_another_type_are_refused(data: dict[str, Any]) -> None:
    with pytest.raises(WrongType, match=next(iter(data))):
        GenerationDefaults.from_json(data)


def test_whole_numbers_are_numbers() -> None:
    assert GenerationDefaults.from_json({"temperature": 1, "top_p": None}).temperature == 1
