"""A tokenizer or a header that would hang, panic or holds a value of another type is one error."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Rust

from transom.errors import SourceError
from transom.sources.safetensors_file import _entry
from transom.text.from_gguf import tokenizer_from_gguf
from transom.text.from_hf import read_json, tokenizer_from_hf
from transom.text.tokenizer import SpecialIds, Tokenizer

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


@pytest.mark.parametrize(
    "pair",
    [
        [{"type": "NFKC"}, replaced({"String": "صلى الله عليه وسلم"}, "\ufdfa\ufdfa")],
        [{"type": "NFKD"}, replaced({"String": "صلى الله عليه وسلم"}, "\ufdfa\ufdfa")],
        [{"type": "Lowercase"}, replaced({"String": "i\u0307"}, "İİ")],
        [{"type": "NFD"}, replaced({"String": "e\u0301"}, "éé")],
        [{"type": "Prepend", "prepend": "a" * 1000}],
        [{"pattern": {"String": "a"}, "content": "aa"}],
    ],
    ids=["NFKC", "NFKD", "Lowercase", "NFD", "Prepend", "without a type"],
)
def test_normalizers_that_lengthen_a_text_by_what_unicode_does_are_refused(tmp_path: Path, pair: list[Any]) -> None:
    with pytest.raises(SourceError, match="it would not end"):
        tokenizer_from_hf(written(tmp_path, normalizer={"type": "Sequence", "normalizers": pair * 25}))


def test_spaces_before_and_between_parts_lengthen_a_text_too(tmp_path: Path) -> None:
    cut = {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False}
    spaces = [{"type": "Metaspace", "replacement": mark, "prepend_scheme": "always"} for mark in "xyz"]
    steps = [step for space in spaces * 10 for step in (cut, space)]
    with pytest.raises(SourceError, match="it would not end"):
        tokenizer_from_hf(written(tmp_path, pre_tokenizer={"type": "Sequence", "pretokenizers": steps}))
    decoders = [{"type": "BPEDecoder", "suffix": ""}] * 40
    with pytest.raises(SourceError, match="it would not end"):
        tokenizer_from_hf(written(tmp_path, decoder={"type": "Sequence", "decoders": decoders}))


def test_a_text_repeated_by_the_post_processor_is_refused(tmp_path: Path) -> None:
    text, other = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    processor = {"type": "TemplateProcessing", "single": [text] * 99999, "pair": [text, other], "special_tokens": {}}
    with pytest.raises(SourceError, match=r"post_processor in .* it would not end"):
        tokenizer_from_hf(written(tmp_path, post_processor=processor))


@pytest.mark.parametrize(
    ("part", "steps", "step"),
    [
        ("normalizer", "normalizers", {"type": "StripAccents"}),
        ("pre_tokenizer", "pretokenizers", {"type": "Whitespace"}),
        ("decoder", "decoders", {"type": "Fuse"}),
        ("post_processor", "processors", {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}),
    ],
)
def test_more_steps_than_any_model_has_are_refused(tmp_path: Path, part: str, steps: str, step: dict[str, Any]) -> None:
    with pytest.raises(SourceError, match=f"more than 256 steps in the .*{part}"):
        tokenizer_from_hf(written(tmp_path, **{part: {"type": "Sequence", steps: [step] * 999}}))


def charsmap(size: int, trie: bytes, replacements: bytes) -> bytes:
    return size.to_bytes(4, "little") + trie + replacements


DAMAGED = {
    "empty": b"",
    "cut": bytes(3),
    "without a trie": bytes(4),
    "no text": charsmap(8, bytes(8), b"\xff"),
    "a large trie": charsmap(0xFFFFFFFF, b"", b""),
    "half a number": charsmap(6, bytes(6), b""),
    "a long replacement": charsmap(8, bytes(8), b"a\0" + b"x" * 5000),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_precompiled_rules_are_an_error(tmp_path: Path, name: str) -> None:
    text = base64.b64encode(DAMAGED[name]).decode()
    with pytest.raises(SourceError, match=r"normalizer in .* is damaged: precompiled_charsmap"):
        tokenizer_from_hf(written(tmp_path, normalizer={"type": "Precompiled", "precompiled_charsmap": text}))


def test_precompiled_rules_that_point_outside_are_an_error_when_they_are_used(tmp_path: Path) -> None:
    text = base64.b64encode(charsmap(8, b"\xff" * 8, b"a\0")).decode()
    tokenizer = tokenizer_from_hf(written(tmp_path, normalizer={"type": "Precompiled", "precompiled_charsmap": text}))
    with pytest.raises(SourceError, match="tokenizer fails on this text"):
        tokenizer.encode("a")


def test_damaged_precompiled_rules_of_a_gguf_file_are_an_error(smollm2: dict[str, Any]) -> None:
    fields = {"model": "t5", "scores": [0.0] * len(smollm2["tokenizer.ggml.tokens"]), "precompiled_charsmap": [255] * 4}
    with pytest.raises(SourceError, match=r"tokenizer\.ggml\.precompiled_charsmap states a trie of"):
        tokenizer_from_gguf({**smollm2, **{f"tokenizer.ggml.{key}": value for key, value in fields.items()}})


def test_a_panic_of_the_package_is_an_error(tmp_path: Path) -> None:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"], "continuing_subword_prefix": "##"}
    with pytest.raises(SourceError, match=r"tokenizer\.json cannot be read"):
        tokenizer_from_hf(written(tmp_path, model=model))
    header = Tokenizer(Rust.from_str(json.dumps(PLAIN)), SpecialIds()).header().encode()
    with pytest.raises(SourceError, match="or it is damaged"):
        Tokenizer.from_parts(header, json.dumps({**PLAIN, "model": model}).encode(), tmp_path)
    decoder = {"type": "Strip", "content": "a", "start": 2**32 - 1, "stop": 2**32 - 1}
    tokenizer = tokenizer_from_hf(written(tmp_path, decoder=decoder))
    with pytest.raises(SourceError, match="tokenizer fails on this answer"):
        tokenizer.decode([0])


def test_usual_replacements_are_accepted(tmp_path: Path) -> None:
    steps = [replaced({"String": " "}, "▁"), replaced({"String": "``"}, '"'), replaced({"Regex": "x"}, "abc")]
    steps += [{"type": "NFKD"}, {"type": "StripAccents"}, {"type": "Lowercase"}, {"type": "Prepend", "prepend": "▁"}]
    rules = base64.b64encode(charsmap(1024, bytes(1024), b"x" * 18 + b"\0")).decode()  # as long as those of real models
    steps.append({"type": "Precompiled", "precompiled_charsmap": rules})
    tokenizer = tokenizer_from_hf(written(tmp_path, normalizer={"type": "Sequence", "normalizers": steps}))
    assert tokenizer.encode("x") == [1]


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
