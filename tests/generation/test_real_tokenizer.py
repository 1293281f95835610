"""Generation with a realistic tokenizer: byte-level BPE, special tokens, tokens of several characters."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fakes import FakeSession, Script, loaded

from transom.errors import OptionError
from transom.generation.model import Model
from transom.text import GenerationDefaults, Tokenizer
from transom.text.tokenizer import SpecialIds

TEXT = 'The weather — "grün", 日本語, 🙂🙃 — is {"fine": true}, [1, 2].\n' * 3


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    from tokenizers import Tokenizer as Rust
    from tokenizers import decoders, models, pre_tokenizers, trainers

    rust = Rust(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|start|>", "<|end|>", "<|turn|>"]
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, special_tokens=special)
    rust.train_from_iterator([TEXT], trainer)
    return Tokenizer(rust, SpecialIds(bos=0, eos=1))


def saying(tokenizer: Tokenizer, ids: list[int], prompt: str = "Q") -> Model:
    session = FakeSession(vocabulary=tokenizer.vocabulary_size + 5, context=2000)
    Script(session, tokenizer.encode(prompt), ids)
    defaults = GenerationDefaults(eos_ids=(1,), bos_id=0)
    return Model(loaded(session, tokenizer=tokenizer, chat_template=None, defaults=defaults))


def test_text_comes_back_as_it_was_in_whole_characters(tokenizer: Tokenizer) -> None:
    stream = saying(tokenizer, [*tokenizer.encode(TEXT), 1]).stream("Q")
    pieces = list(stream)
    assert "".join(pieces) == stream.result.text == TEXT
    assert len(pieces) < len(TEXT)
    assert "\ufffd" not in "".join(pieces)


@pytest.mark.parametrize("stop", ["語", "}, [", "🙃", "is {", "eather"])
def test_a_stop_string_that_no_token_boundary_respects_is_found(tokenizer: Tokenizer, stop: str) -> None:
    result = saying(tokenizer, [*tokenizer.encode(TEXT), 1]).generate("Q", stop=stop)
    assert result.text == TEXT[: TEXT.index(stop)]
    assert result.choices[0].stop == stop


def test_special_tokens_in_the_answer_are_not_text_but_may_be_stopped_at(tokenizer: Tokenizer) -> None:
    model = saying(tokenizer, [*tokenizer.encode("a<|turn|>b"), 1])
    assert model.generate("Q").text == "ab"
    assert model.generate("Q", stop="<|turn|>").text == "a"


def test_noise_becomes_json_that_fits(tokenizer: Tokenizer) -> None:
    model = saying(tokenizer, [])
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {"word": {"type": "string", "maxLength": 12}, "many": {"type": "integer", "maximum": 999}},
        "required": ["word", "many"],
        "additionalProperties": False,
    }
    for seed in range(6):
        result = model.generate("Q", json_schema=schema, temperature=1.0, seed=seed)
        value = json.loads(result.text)
        assert set(value) == {"word", "many"}
        assert isinstance(value["word"], str)
        assert len(value["word"]) <= 12
        assert isinstance(value["many"], int)
        assert value["many"] <= 999
        assert tokenizer.special_ids.isdisjoint(result.token_ids[:-1])


def test_text_that_is_not_unicode_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(OptionError, match="lone surrogate"):
        saying(tokenizer, []).generate("ab\udcff")
