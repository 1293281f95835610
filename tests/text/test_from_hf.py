"""Hugging Face directories: they give what transformers reads from them, and damaged ones are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from transom.errors import SourceError
from transom.text.from_hf import chat_template_from_hf, generation_from_hf, read_json, tokenizer_from_hf

Make = Callable[..., Any]
PATTERN = r"'s|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"
CHAT = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def folder(train_byte_level: Make, tmp_path: Path) -> Path:
    """A directory as transformers writes it, with a template and a post-processor that adds the beginning token."""
    trained: Tokenizer = train_byte_level(PATTERN, specials=("<s>", "</s>", "<pad>"))
    trained.add_tokens([AddedToken("<think>", special=False)])
    trained.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=trained, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=64
    )
    fast.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    fast.save_pretrained(tmp_path)
    return tmp_path


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    content.update(changes)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_a_directory_reads_as_transformers_reads_it(folder: Path, texts: list[str]) -> None:
    oracle = AutoTokenizer.from_pretrained(folder)
    ours = tokenizer_from_hf(folder)
    for text in [*texts, "a <think>b</s>"]:
        ids = ours.encode(text)
        assert ids == oracle.encode(text), repr(text)
        assert ours.encode(text, add_special=False) == oracle.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == oracle.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special=False) == oracle.decode(ids)
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.unk_id) == (0, 1, 2, None)
    assert (ours.add_bos, ours.add_eos) == (True, False)
    assert ours.vocabulary_size == len(oracle)
    assert ours.special_ids == set(oracle.all_special_ids)


@pytest.mark.parametrize(("bos", "eos"), [(False, False), (True, True), (False, True)])
def test_the_post_processor_rules_over_stated_flags_as_in_transformers(bos: bool, eos: bool, folder: Path) -> None:
    edit(folder / "tokenizer_config.json", add_bos_token=bos, add_eos_token=eos)
    oracle, ours = AutoTokenizer.from_pretrained(folder), tokenizer_from_hf(folder)
    assert ours.encode("Hello") == oracle.encode("Hello")
    assert (ours.add_bos, ours.add_eos) == (True, False)


def test_a_long_text_is_not_cut_at_the_settings_of_the_trainer(folder: Path) -> None:
    description = json.loads((folder / "tokenizer.json").read_text())
    description["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(description))
    assert len(tokenizer_from_hf(folder).encode("one two three " * 50)) > 100


def test_roles_come_from_the_older_map_or_the_model_configuration(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", bos_token=None, eos_token=None, pad_token=None)
    edit(folder / "special_tokens_map.json", eos_token={"content": "</s>", "lstrip": False})
    edit(folder / "config.json", bos_token_id=0, eos_token_id=[1, 2], pad_token_id=2)
    ours = tokenizer_from_hf(folder)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (0, 1, 2)


def test_tokens_only_the_configuration_knows_are_added(folder: Path) -> None:
    size = tokenizer_from_hf(folder).vocabulary_size
    added = {str(size): {"content": "<|im_end|>", "special": True}, str(size + 1): {"content": "<b>", "special": False}}
    edit(folder / "tokenizer_config.json", added_tokens_decoder=added)
    ours = tokenizer_from_hf(folder)
    assert ours.encode("a<|im_end|><b>", add_special=False)[-2:] == [size, size + 1]
    assert ours.decode([size, size + 1]) == "<b>"


def test_tokens_whose_ids_contradict_are_refused(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", added_tokens_decoder={"999999": {"content": "<x>", "special": True}})
    with pytest.raises(SourceError, match=r"'<x>' has the id 999999 in tokenizer_config\.json"):
        tokenizer_from_hf(folder)


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_model_alone_is_enough(
    prefix: bool, train_sentencepiece: Make, texts: list[str], tmp_path: Path
) -> None:
    path = train_sentencepiece("bpe", add_dummy_prefix=prefix, user_defined_symbols=["<think>", "[sep]"])
    shutil.copy(path, tmp_path / "tokenizer.model")
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ours = tokenizer_from_hf(tmp_path)
    for text in [*texts, "a<think>b [sep] c"]:
        if "▁" in text or "\0" in text:
            continue
        ids = ours.encode(text, add_special=False, parse_special=False)
        assert ids == oracle.encode(text), repr(text)
        assert ours.decode(ids) == text
    assert (ours.bos_id, ours.eos_id, ours.unk_id) == (1, 2, 0)
    assert ours.encode("a")[0] == 1


def test_control_tokens_spelled_out_beside_user_defined_ones_stay_text(
    train_sentencepiece: Make, tmp_path: Path
) -> None:
    path = train_sentencepiece("bpe", add_dummy_prefix=False, user_defined_symbols=["<think>", "[sep]"])
    shutil.copy(path, tmp_path / "tokenizer.model")
    ours = tokenizer_from_hf(tmp_path)
    for text in ("<s>", "<think><s><think>", "</s>[sep]<unk>"):
        ids = ours.encode(text, add_special=False, parse_special=False)
        assert not set(ids) & ours.special_ids
        assert ours.decode(ids) == text
    assert ours.encode("<s><think>", add_special=False) == [1, 3]


def test_a_unigram_model_with_normalization_is_read(train_sentencepiece: Make, tmp_path: Path) -> None:
    options = {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True, "character_coverage": 1.0}
    path = train_sentencepiece("unigram", **options)
    shutil.copy(path, tmp_path / "tokenizer.model")
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ours = tokenizer_from_hf(tmp_path)
    for text in ["Hello world", "  a   b  ", "ﬁne ½ ① é", "The statement is executed."]:
        ids = ours.encode(text, add_special=False)
        assert ours.decode(ids) == oracle.decode(oracle.encode(text)), repr(text)


def test_templates_are_looked_for_where_transformers_looks(folder: Path) -> None:
    tokenizer = tokenizer_from_hf(folder)

    def rendered(**options: Any) -> str:
        template = chat_template_from_hf(folder, tokenizer)
        assert template is not None
        return template.render(CHAT, **options)

    oracle = AutoTokenizer.from_pretrained(folder)
    assert rendered() == "<s>Hi</s>" == oracle.apply_chat_template(CHAT, tokenize=False)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    edit(folder / "tokenizer_config.json", chat_template="config")
    assert rendered() == "config"
    named = [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two {{ tools }}"}]
    edit(folder / "tokenizer_config.json", chat_template=named)
    assert rendered() == "one"
    assert rendered(template="tool_use") == "two None"
    edit(folder / "chat_template.json", chat_template="json")
    assert rendered() == "json"
    (folder / "chat_template.jinja").write_text("{{ image_token }}")
    edit(folder / "tokenizer_config.json", image_token="<img>")
    assert rendered() == "<img>"
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("rag")
    assert rendered(template="rag") == "rag"


def test_a_directory_without_a_template_has_none(tmp_path: Path) -> None:
    assert chat_template_from_hf(tmp_path, None) is None


def test_generation_defaults_come_from_the_directory(folder: Path) -> None:
    edit(folder / "generation_config.json", eos_token_id=[1, 2], temperature=0.6, top_k=20, do_sample=True)
    defaults = generation_from_hf(folder, tokenizer_from_hf(folder))
    assert (defaults.eos_ids, defaults.temperature, defaults.top_k, defaults.sample) == ((1, 2), 0.6, 20, True)


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("tokenizer.json", "{", "cannot be read"),
        ("tokenizer.json", "version https://git-lfs.github.com/spec/v1", "a Git LFS pointer"),
        ("tokenizer.json", "{}", "cannot be read"),
        ("tokenizer.json", '{"version": "1.0", "model": {"type": "Nonsense"}}', "cannot be read"),
        ("tokenizer.json", b"\xff\xfe\x00", "not a text file in UTF-8"),
        ("tokenizer_config.json", "{", "is not valid JSON"),
        ("tokenizer_config.json", "[1]", "does not contain a JSON object"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"7": 3}}', "added_tokens_decoder"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "y"}}}', "added_tokens_decoder"),
        ("special_tokens_map.json", "nonsense", "is not valid JSON"),
        ("added_tokens.json", '{"a": ', "is not valid JSON"),
    ],
)
def test_damaged_files_are_refused_with_their_name(name: str, content: str | bytes, cause: str, folder: Path) -> None:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SourceError) as caught:
        tokenizer_from_hf(folder)
    assert cause in caught.value.cause
    assert name in caught.value.cause
    assert caught.value.fix


def test_templates_that_are_no_templates_are_refused(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    edit(folder / "tokenizer_config.json", chat_template=[{"name": "default"}])
    with pytest.raises(SourceError, match=r"chat_template.* in .*tokenizer_config\.json"):
        chat_template_from_hf(folder, None)


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="has no tokenizer"):
        tokenizer_from_hf(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(SourceError, match=r"only vocab.json.*save_pretrained"):
        tokenizer_from_hf(tmp_path)


@pytest.mark.parametrize("content", [b"", b"IQ== 0\nIg== 1\n" * 20, b"\x0a\xff\xff\xff\xff", "cut", "word"])
def test_a_file_that_is_no_sentencepiece_model_is_refused(
    content: bytes | str, train_sentencepiece: Make, tmp_path: Path
) -> None:
    if content == "cut":
        content = train_sentencepiece("bpe").read_bytes()[:5000]
    elif content == "word":
        content = train_sentencepiece("word", byte_fallback=False).read_bytes()
    assert isinstance(content, bytes)
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(SourceError) as caught:
        tokenizer_from_hf(tmp_path)
    assert "tokenizer.model" in caught.value.cause
    assert "AutoTokenizer" in caught.value.fix


def test_an_absent_json_file_is_an_error_only_without_a_default(tmp_path: Path) -> None:
    assert read_json(tmp_path / "config.json", {}) == {}
    with pytest.raises(SourceError, match=r"config\.json cannot be read"):
        read_json(tmp_path / "config.json")
