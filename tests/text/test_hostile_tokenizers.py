"""A tokenizer or a header that would hang, panic or holds a value of another type is one error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from transom.errors import SourceError
from transom.sources.safetensors_file import _entry
from transom.text.from_gguf import tokenizer_from_gguf
from transom.text.from_hf import read_json, tokenizer_from_hf

PLAIN: dict[str, Any] = {
    "version": "1.0",
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": None,
    "post_processor": None,
    "decoder": None,
    "model": {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"},
}


def replaced(old: dict[str, str], new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": old, "content": new}


def written(folder: Path, **parts: Any) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps({**PLAIN, **parts}))
    return folder


@pytest.mark.parametrize("pattern", [{"String": "a"}, {"Regex": "."}])
def test_normalizers_that_lengthen_a_text_without_end_are_refused(tmp_path: Path, pattern: dict[str, str]) -> None:
    steps = {"type": "Sequence", "normalizers": [replaced(pattern, "aa")] * 40}
    with pytest.raises(SourceError, match="it would not end"):
        tokenizer_from_hf(written(tmp_path, normalizer={"type": "Sequence", "normalizers": [steps]}))


def test_other_rules_that_lengthen_a_text_without_end_are_refused(tmp_path: Path) -> None:
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    with pytest.raises(SourceError, match=r"pre_tokenizer in .* it would not end"):
        tokenizer_from_hf(written(tmp_path, pre_tokenizer={"type": "Sequence", "pretokenizers": [level] * 40}))
    decoders = [replaced({"String": "a"}, "aa")] * 40
    with pytest.raises(SourceError, match=r"decoder in .* it would not end"):
        tokenizer_from_hf(written(tmp_path, decoder={"type": "Sequence", "decoders": decoders}))


def test_usual_replacements_are_accepted(tmp_path: Path) -> None:
    steps = [replaced({"String": " "}, "▁"), replaced({"String": "``"}, '"'), replaced({"Regex": "x"}, "abc")]
    tokenizer = tokenizer_from_hf(written(tmp_path, normalizer={"type": "Sequence", "normalizers": steps}))
    assert tokenizer.encode("a") == [0]


def test_an_expression_that_takes_too_many_steps_is_an_error(tmp_path: Path) -> None:
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    tokenizer = tokenizer_from_hf(written(tmp_path, pre_tokenizer=split))
    with pytest.raises(SourceError, match="tokenizer fails on this text"):
        tokenizer.encode("a" * 40 + "!")
    assert tokenizer.encode("a") == [0]


def test_a_special_token_without_a_definition_is_an_error(tmp_path: Path) -> None:
    text, other = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    single = [{"SpecialToken": {"id": "X", "type_id": 0}}, text]
    processor = {"type": "TemplateProcessing", "single": single, "pair": [text, other], "special_tokens": {}}
    with pytest.raises(SourceError, match="special token 'X', which it does not define"):
        tokenizer_from_hf(written(tmp_path, post_processor=processor))


@pytest.mark.parametrize("digits", [400, 5000])
def test_a_number_that_no_float_holds_is_infinite_and_refused_by_name(tmp_path: Path, digits: int) -> None:
    (tmp_path / "added_tokens.json").write_text('{"<x>": 1' + "0" * digits + "}")
    assert read_json(tmp_path / "added_tokens.json") == {"<x>": float("inf")}
    with pytest.raises(SourceError, match=r"<x> in .*added_tokens\.json is inf, not a whole number"):
        tokenizer_from_hf(written(tmp_path))


@pytest.mark.parametrize(
    ("key", "value", "cause"),
    [
        ("merges", [1, 2], "the merge 1 .* is not text"),
        ("merges", 7, "the merge 7 .* is not text"),
        ("bos_token_id", "one", "bos_token_id is 'one', not a token id"),
        ("eos_token_id", [1], "eos_token_id is"),
        ("unknown_token_id", 1.5, "unknown_token_id is"),
    ],
)
def test_a_gguf_field_of_another_type_is_an_error(smollm2: dict[str, Any], key: str, value: Any, cause: str) -> None:
    with pytest.raises(SourceError, match=cause):
        tokenizer_from_gguf({**smollm2, f"tokenizer.ggml.{key}": value})


@pytest.mark.parametrize("dtype", [["F32"], {"a": 1}, None, 7])
def test_a_tensor_type_that_is_no_text_is_an_error(tmp_path: Path, dtype: Any) -> None:
    with pytest.raises(SourceError):
        _entry(tmp_path / "model.safetensors", "weight", {"dtype": dtype, "shape": [1], "data_offsets": [0, 4]})
