"""The verification finds every way in which the files can differ."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from typing import Any

import pytest

from transom.text import ChatTemplate, GenerationDefaults, Tokenizer
from transom.text.from_gguf import chat_template_from_gguf, tokenizer_from_gguf
from transom.text.proving import LANGUAGES, TextComparison, TextMismatch, compare, corpus, verify_texts
from transom.text.to_hf import hf_files

Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def ours(smollm2: dict[str, Any]) -> Tokenizer:
    return tokenizer_from_gguf(smollm2)


@pytest.fixture(scope="module")
def template(smollm2: dict[str, Any], ours: Tokenizer) -> ChatTemplate:
    found = chat_template_from_gguf(smollm2, ours)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def files(ours: Tokenizer, template: ChatTemplate) -> dict[str, bytes]:
    return hf_files(ours, template, GenerationDefaults())


def changed(files: dict[str, bytes], name: str, change: Change) -> dict[str, bytes]:
    whole = json.loads(files[name])
    change(whole)
    return {**files, name: json.dumps(whole).encode()}


def test_it_counts_what_it_compared(ours: Tokenizer, template: ChatTemplate, files: dict[str, bytes]) -> None:
    texts = corpus(ours)
    tokens = sum(len(ours.encode(text)) for text in texts)
    assert verify_texts(ours, template, files) == TextComparison(len(texts), 2 * tokens, len(LANGUAGES))
    assert tokens > 2000


def test_the_corpus_has_the_scripts_and_shapes_that_tokenizers_differ_on(ours: Tokenizer) -> None:
    whole = "\n".join(corpus(ours))
    scripts = {unicodedata.name(character, "").split()[0] for character in whole if character.isalpha()}
    assert {
        *("LATIN", "CYRILLIC", "GREEK", "ARABIC", "HEBREW", "DEVANAGARI", "BENGALI", "TAMIL", "THAI", "CJK"),
        *("HIRAGANA", "KATAKANA", "HANGUL", "GEORGIAN", "ARMENIAN", "ETHIOPIC"),
    } <= scripts
    for part in ("\r\n", "\t", "    ", "\u200d", "\U0001f3fd", "e\u0301", "\u200b", "<|im_end|>", "a<|im_start|>b"):
        assert part in whole, repr(part)
    assert "" in corpus(ours)


def swap(whole: dict[str, Any]) -> None:
    vocabulary = whole["model"]["vocab"]
    vocabulary["Ġthe"], vocabulary["Ġand"] = vocabulary["Ġand"], vocabulary["Ġthe"]


def forget_the_last_merges(whole: dict[str, Any]) -> None:
    del whole["model"]["merges"][1000:]


def cut_otherwise(whole: dict[str, Any]) -> None:
    del whole["pre_tokenizer"]["pretokenizers"][0]
    whole["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\s+|\S+"


def normalize(whole: dict[str, Any]) -> None:
    whole["normalizer"] = {"type": "NFC"}


def not_special(whole: dict[str, Any]) -> None:
    whole["added_tokens"] = whole["added_tokens"][:1]


def begin_with_a_token(whole: dict[str, Any]) -> None:
    token = "<|im_start|>"
    whole["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [1], "tokens": [token]}},
    }


@pytest.mark.parametrize(
    "change", [swap, forget_the_last_merges, cut_otherwise, normalize, not_special, begin_with_a_token]
)
def test_other_tokens_are_found_and_named(
    change: Change, ours: Tokenizer, template: ChatTemplate, files: dict[str, bytes]
) -> None:
    with pytest.raises(TextMismatch, match="give different tokens for the text") as caught:
        verify_texts(ours, template, changed(files, "tokenizer.json", change))
    here, there = caught.value.details
    assert here.startswith("Transom: [")
    assert there.startswith("the files: [")
    assert here.split("[")[1] != there.split("[")[1]


def test_another_decoder_is_found(ours: Tokenizer, template: ChatTemplate, files: dict[str, bytes]) -> None:
    def spell(whole: dict[str, Any]) -> None:
        whole["decoder"] = {"type": "Fuse"}

    with pytest.raises(TextMismatch, match="give a different text"):
        verify_texts(ours, template, changed(files, "tokenizer.json", spell))


def test_another_special_token_or_template_is_found(
    ours: Tokenizer, template: ChatTemplate, files: dict[str, bytes]
) -> None:
    def end(whole: dict[str, Any]) -> None:
        whole["eos_token"] = "<|endoftext|>"

    def shout(whole: dict[str, Any]) -> None:
        whole["chat_template"] = whole["chat_template"].replace("message['content']", "message['content'] | upper")

    def lose(whole: dict[str, Any]) -> None:
        del whole["chat_template"]

    with pytest.raises(TextMismatch, match="state a different special token eos_token"):
        verify_texts(ours, template, changed(files, "tokenizer_config.json", end))
    with pytest.raises(TextMismatch, match="different prompt"):
        verify_texts(ours, template, changed(files, "tokenizer_config.json", shout))
    with pytest.raises(TextMismatch, match="lack the chat template"):
        verify_texts(ours, template, changed(files, "tokenizer_config.json", lose))
    verify_texts(ours, None, changed(files, "tokenizer_config.json", lose))


def test_compare_names_each_text_that_is_cut_otherwise(ours: Tokenizer) -> None:
    def careless(text: str) -> list[int]:
        return ours.encode(text.replace("\r\n", "\n"), add_special=False)

    found = compare(ours, careless)
    assert all("\r\n" in difference.text for difference in found)
    assert len(found) == sum("\r\n" in text for text in corpus(ours))
    assert f"{list(found[0].ours)} here, {list(found[0].theirs)} there" in str(found[0])
    assert compare(ours, lambda text: ours.encode(text, add_special=False)) == []
