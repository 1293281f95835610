"""The files for other programs, as read by those programs: `tokenizers`, `transformers`, and ONNX Runtime GenAI.

Draws: what is compared must be equal, whatever the numbers are.
"""

from __future__ import annotations

import json
import random
import re
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Rust

from transom.text import ChatTemplate, GenerationDefaults, SpecialIds, Tokenizer
from transom.text.from_gguf import chat_template_from_gguf, tokenizer_from_gguf
from transom.text.pre_tokenizers import pre_tokenizer
from transom.text.proving import compare, verify_texts
from transom.text.to_hf import hf_files

Make = Callable[..., Any]
NONE = GenerationDefaults()
TALK = [
    {"role": "user", "content": "Où est la gare ?\n"},
    {"role": "assistant", "content": "Là-bas 🙂"},
    {"role": "user", "content": "  <b>&  "},
]


def write(files: Mapping[str, bytes], folder: Path) -> Path:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def genai(files: Mapping[str, bytes], folder: Path) -> Any:
    """ONNX Runtime GenAI's tokenizer for these files; its configuration names a model that does not exist."""
    import onnxruntime_genai

    model = {
        "type": "llama",
        "vocab_size": 1 << 16,
        "context_length": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "decoder": {
            "filename": "model.onnx",
            "session_options": {"provider_options": []},
            "head_size": 64,
            "hidden_size": 64,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "num_hidden_layers": 1,
            "inputs": {},
            "outputs": {},
        },
    }
    write({**files, "genai_config.json": json.dumps({"model": model, "search": {}}).encode()}, folder)
    return onnxruntime_genai.Tokenizer(onnxruntime_genai.Config(str(folder)))


def transformers(files: Mapping[str, bytes], folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(write(files, folder)))


def short_words(text: str) -> bool:
    """GenAI cuts a SentencePiece text at the end of a word once it has more than ten characters, or bytes of them, and
    anywhere after a hundred (`SpmTokenize` of onnxruntime-extensions). So a word follows up to ten characters."""
    words = re.findall(r"[ \n\r\u2581]*[^ \n\r\u2581]*", text)
    return max(len(word.encode()) for word in words) + 10 <= 100


@pytest.fixture
def spoken(texts: list[str]) -> list[str]:
    """Texts that an app can pass on: C strings of the length of prompts."""
    return [text for text in texts if text and "\0" not in text]


def test_smollm2_is_the_same_in_transformers_and_in_genai(
    smollm2: dict[str, Any], spoken: list[str], tmp_path: Path
) -> None:
    ours = tokenizer_from_gguf(smollm2)
    template = chat_template_from_gguf(smollm2, ours)
    assert template is not None
    files = hf_files(ours, template, NONE)
    there, phone = transformers(files, tmp_path), genai(files, tmp_path)
    assert compare(ours, phone.encode) == []
    for text in spoken:
        ids = ours.encode(text)
        assert list(there.encode(text)) == ids
        assert [int(token) for token in phone.encode(text)] == ids, repr(text)
        assert phone.decode(ids) == ours.decode(ids)
    prompt = template.render(TALK)
    assert there.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True) == prompt
    assert phone.apply_chat_template(json.dumps(TALK), add_generation_prompt=True) == prompt
    assert there.special_tokens_map == ours.special_tokens
    assert (there.eos_token_id, there.pad_token_id) == (ours.eos_id, ours.pad_id)


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2", "gpt-4o", "tekken"])
def test_byte_level_vocabularies_are_cut_alike_by_genai(
    pre: str, train_byte_level: Make, gguf_metadata: Make, spoken: list[str], tmp_path: Path
) -> None:
    trained = train_byte_level(pre_tokenizer(pre).patterns[-1])
    ours = tokenizer_from_gguf(gguf_metadata(trained, pre, bos_token_id=0, eos_token_id=1))
    files = hf_files(ours, None, NONE)
    verify_texts(ours, None, files)
    phone = genai(files, tmp_path)
    for difference in compare(ours, phone.encode):  # it normalizes nothing
        assert pre == "qwen2", difference
        assert not unicodedata.is_normalized("NFC", difference.text), difference
    for text in spoken:
        if pre != "qwen2" or unicodedata.is_normalized("NFC", text):
            assert [int(token) for token in phone.encode(text)] == ours.encode(text, add_special=False), repr(text)


@pytest.mark.seeds(1495094106, 3719244970)
@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_vocabularies_are_cut_alike_by_genai_and_transformers(
    prefix: bool, train_sentencepiece: Make, sentencepiece_metadata: Make, spoken: list[str], tmp_path: Path
) -> None:
    path = train_sentencepiece("bpe", add_dummy_prefix=prefix)
    ours = tokenizer_from_gguf(sentencepiece_metadata(path, add_space_prefix=prefix, add_bos_token=True))
    files = hf_files(ours, None, NONE)
    there, phone = transformers(files, tmp_path), genai(files, tmp_path)
    for difference in compare(ours, phone.encode):
        assert not short_words(difference.text), difference
    phone.update_options(add_special_tokens="true")
    for text in spoken:
        assert list(there.encode(text)) == ours.encode(text)
        if short_words(text):
            assert [int(token) for token in phone.encode(text)] == ours.encode(text), repr(text)


@pytest.mark.parametrize("scheme", ["never", "always"])
def test_a_metaspace_decoder_is_seen_by_genai(scheme: Any, tmp_path: Path) -> None:
    trained = Rust(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    trained.decoder = decoders.Metaspace(prepend_scheme=scheme)
    words = ["the sun went down behind the hill and the water was still"] * 50
    trained.train_from_iterator(words, trainers.BpeTrainer(special_tokens=["<unk>"], show_progress=False))
    ours = Tokenizer(trained, SpecialIds(unk=0))
    files = hf_files(ours, None, NONE)
    verify_texts(ours, None, files)
    phone = genai(files, tmp_path)
    for text in ("the sun", "the water was down and the hill still behind", "a the  sun"):
        assert [int(token) for token in phone.encode(text)] == ours.encode(text)
        assert phone.decode(ours.encode(text)).strip() == text


def test_a_unigram_vocabulary_is_refused_by_genai_and_read_by_transformers(
    train_sentencepiece: Make, sentencepiece_metadata: Make, tmp_path: Path
) -> None:
    metadata = sentencepiece_metadata(train_sentencepiece("unigram"), model="t5", add_eos_token=True, eos_token_id=2)
    ours = tokenizer_from_gguf(metadata)
    files = hf_files(ours, None, NONE)
    assert verify_texts(ours, None, files).languages > 20
    assert list(transformers(files, tmp_path).encode("the sun went down")) == ours.encode("the sun went down")
    with pytest.raises(Exception, match="type must be object"):
        genai(files, tmp_path)


@pytest.mark.parametrize("individual", [True, False])
def test_digits_and_the_pattern_of_byte_level_mean_the_same_written_out(
    individual: bool, dice: random.Random, texts: list[str]
) -> None:
    trained = Rust(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual), pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(False)])]
    )
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    trained.train_from_iterator(texts, trainer)
    files = hf_files(Tokenizer(trained, SpecialIds()), None, NONE)
    steps = json.loads(files["tokenizer.json"])["pre_tokenizer"]["pretokenizers"]
    assert [step["type"] for step in steps] == ["Split", "Split", "ByteLevel"]
    other = Rust.from_str(files["tokenizer.json"].decode())
    dice.shuffle(texts)
    for text in texts:
        assert other.encode(text).ids == trained.encode(text).ids, repr(text)


def byte_tokenizer(ids: SpecialIds, specials: tuple[str, ...] = ("<s>", "</s>", "<pad>")) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    rust = Rust(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(False)
    rust.decoder = decoders.ByteLevel()
    rust.add_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    return Tokenizer(rust, ids)


def test_the_configuration_names_tokens_and_template() -> None:
    ours = byte_tokenizer(SpecialIds(bos=256))
    template = ChatTemplate(
        {"default": "{{ bos_token }}{{ image_token }}", "tool_use": "x"}, {"image_token": "<img>", "bos_token": "<s>"}
    )
    files = hf_files(ours, template, GenerationDefaults(eos_ids=(257,), pad_id=258))
    config = json.loads(files["tokenizer_config.json"])
    assert list(files) == ["tokenizer.json", "tokenizer_config.json"]
    assert config == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "image_token": "<img>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "add_bos_token": False,
        "add_eos_token": False,
        "chat_template": "{{ bos_token }}{{ image_token }}",
    }


def test_several_templates_without_a_default_are_left_out() -> None:
    template = ChatTemplate({"one": "1", "two": "2"})
    ours = byte_tokenizer(SpecialIds())
    files = hf_files(ours, template, NONE)
    assert "chat_template" not in json.loads(files["tokenizer_config.json"])
    verify_texts(ours, template, files)


def test_ends_that_are_no_beginning_or_end_token_are_left_to_the_post_processor(tmp_path: Path) -> None:
    inner = byte_tokenizer(SpecialIds(), ("[gMASK]", "<sop>"))
    rust = Rust.from_str(inner.to_json())
    rust.post_processor = processors.TemplateProcessing(
        single="[gMASK] <sop> $A", special_tokens=[("[gMASK]", 256), ("<sop>", 257)]
    )
    ours = Tokenizer(rust, SpecialIds(bos=257, add_bos=True))
    files = hf_files(ours, None, NONE)
    assert "add_bos_token" not in json.loads(files["tokenizer_config.json"])
    assert list(transformers(files, tmp_path).encode("hi")) == ours.encode("hi") == [256, 257, 71, 72]
