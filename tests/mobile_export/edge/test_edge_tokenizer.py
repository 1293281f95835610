"""The runner's tokenizer gives the ids, and the text, that the `tokenizers` package gives; or it says what it does not
know.

Draws: what is compared must be equal, whatever the numbers are.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unicodedata import ucd_3_2_0

import numpy as np
import pytest
from models import sample_model
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from transom.sources import resolve
from transom.text import spm
from transom.text.defaults import GenerationDefaults
from transom.text.pre_tokenizers import PRE_TOKENIZERS
from transom.text.proving import corpus
from transom.text.spelling import BYTE_ALPHABET
from transom.text.to_hf import hf_files
from transom.text.tokenizer import SpecialIds
from transom.text.tokenizer import Tokenizer as Ours

Call = Callable[..., Any]

# Patterns of models that people run on phones: each of another form
FAMILIES = (
    "gpt-2",
    "llama-bpe",
    "qwen2",
    "qwen35",
    "gpt-4o",
    "tekken",
    "smollm",
    "deepseek-v3",
    "bloom",
    "falcon",
    "youtu",
)


def random_texts(rng: np.random.Generator, count: int, *, old: bool = False) -> list[str]:
    """Characters from everywhere, in runs of one block, with much white space between.

    `old`: only those of Unicode 3.2. The `tokenizers` package normalizes by tables older than some combining marks.
    """
    spaces = [" ", "  ", "\n", "\r\n", "\t", " \n ", "\u00a0", "\u3000", "\u180e", "\u2028", "\x85", "\x0b"]
    known = list(map(chr, [*range(0x20, 0x3000), *range(0x3000, 0xD800, 7), *range(0x1F300, 0x1F650)]))
    category = ucd_3_2_0.category if old else unicodedata.category
    known = [c for c in known if category(c) not in ("Cn", "Cs", "Co")]
    texts = []
    for _ in range(count):
        text = ""
        for _ in range(rng.integers(1, 12)):
            start = int(rng.integers(len(known) - 40)) if rng.random() < 0.6 else 0
            text += "".join(known[start + int(i)] for i in rng.integers(40 if start else 95, size=rng.integers(1, 8)))
            if rng.random() < 0.6:
                text += spaces[int(rng.integers(len(spaces)))]
        texts.append(text)
    return texts


def save(tokenizer: Tokenizer, path: Path) -> Path:
    path.write_text(tokenizer.to_str(), encoding="utf-8")
    return path


def byte_level(family: str) -> Tokenizer:
    """A byte-level BPE tokenizer of a family's pattern, trained on a few texts."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=PRE_TOKENIZERS[family].ignore_merges))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[family].build()
    if PRE_TOKENIZERS[family].nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(_TRAINING, trainer)
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", special=True, normalized=False)])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=True), AddedToken("<|x|>", lstrip=True, rstrip=True)])
    return tokenizer


def sentencepiece(rng: np.random.Generator, **more: Any) -> Tokenizer:
    """A SentencePiece-like vocabulary with byte fallback, from words of the training text."""
    words = sorted({word for text in _TRAINING for word in text.replace(" ", " ▁").split()})
    pieces = {c for word in words for c in word} | {"▁"}
    for word in words:
        for cut in rng.integers(1, len(word) + 1, size=4):
            pieces |= {word[: int(cut)], word[int(cut) :], word[:2]}
    pieces |= {word[:end] for word in words for end in range(1, len(word) + 1)}
    chosen = sorted(pieces - {""})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *chosen]
    scores = [0.0] * 259 + [float(-score) for score in rng.permutation(len(chosen))]
    types = [spm.UNKNOWN, spm.CONTROL, spm.CONTROL, *[spm.BYTE] * 256, *[spm.NORMAL] * len(chosen)]
    tokenizer = spm.build(spm.SentencePieceModel(tokens, scores, types, **more))
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    return tokenizer


def same(call: Call, tokenizer: Tokenizer, path: Path, texts: list[str]) -> None:
    """Equal ids with and without special tokens read as such, and equal text from a stream of them."""
    save(tokenizer, path)
    for parse in (True, False):
        tokenizer.encode_special_tokens = not parse
        wanted = [tokenizer.encode(text).ids for text in texts]
        found = call("encode", tokenizer=str(path), texts=texts, parse_special=parse)
        wrong = [(t, a, b) for t, a, b in zip(texts, wanted, found, strict=True) if a != b]
        assert not wrong, f"{len(wrong)} of {len(texts)}, such as {wrong[0]}"
    ours = Ours(tokenizer, SpecialIds())
    streams = call("decode", tokenizer=str(path), ids=found)
    for ids, pieces in zip(found, streams, strict=True):
        stream = ours.stream()
        assert pieces == [*(stream.push(token) for token in ids), stream.finish()]


def test_the_sample_models_ids(call: Call, tmp_path: Path, rng: np.random.Generator) -> None:
    path = sample_model()
    tokenizer = resolve(path).open(path).tokenizer
    assert tokenizer is not None
    rust = Tokenizer.from_str(tokenizer.to_json())
    texts = [*corpus(tokenizer), *random_texts(rng, 150), "<|im_start|>user\nHi<|im_end|>\n", "a" * 3000, ""]
    same(call, rust, tmp_path / "tokenizer.json", texts)


@pytest.mark.parametrize("family", FAMILIES)
def test_patterns_of_other_families(call: Call, tmp_path: Path, rng: np.random.Generator, family: str) -> None:
    texts = random_texts(rng, 60, old=PRE_TOKENIZERS[family].nfc)
    same(call, byte_level(family), tmp_path / "tokenizer.json", [*_TEXTS, *texts])


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_with_byte_fallback(call: Call, tmp_path: Path, rng: np.random.Generator, prefix: bool) -> None:
    tokenizer = sentencepiece(rng, add_space_prefix=prefix)
    same(call, tokenizer, tmp_path / "tokenizer.json", [*_TEXTS, *random_texts(rng, 60)])


@pytest.mark.parametrize("prefix", [True, False])
def test_the_form_that_bundles_have(call: Call, tmp_path: Path, rng: np.random.Generator, prefix: bool) -> None:
    """A SentencePiece-like vocabulary as `transom export` writes it for other programs."""
    ours = Ours(sentencepiece(rng, add_space_prefix=prefix), SpecialIds(bos=1, eos=2, unk=0))
    path = tmp_path / "tokenizer.json"
    path.write_bytes(hf_files(ours, None, GenerationDefaults(eos_ids=(2,)))["tokenizer.json"])
    texts = [*_TEXTS, *random_texts(rng, 40)]
    ids = call("encode", tokenizer=str(path), texts=texts)
    assert ids == [ours.encode(text) for text in texts]
    for tokens, pieces in zip(ids, call("decode", tokenizer=str(path), ids=ids), strict=True):
        assert "".join(pieces) == ours.decode(tokens)


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
@pytest.mark.parametrize("split", [True, False])
def test_metaspace(call: Call, tmp_path: Path, rng: np.random.Generator, scheme: Any, split: bool) -> None:
    tokenizer = sentencepiece(rng)
    tokenizer.normalizer = None
    commas = pre_tokenizers.Split(",", "isolated")
    spaces = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([commas, spaces])
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)])
    same(call, tokenizer, tmp_path / "tokenizer.json", [*_TEXTS, *random_texts(rng, 30)])


@pytest.mark.parametrize("behavior", ["isolated", "removed", "merged_with_previous", "merged_with_next", "contiguous"])
@pytest.mark.parametrize("invert", [True, False])
def test_what_becomes_of_a_match(
    call: Call, tmp_path: Path, rng: np.random.Generator, behavior: Any, invert: bool
) -> None:
    tokenizer = byte_level("gpt-2")
    split = pre_tokenizers.Split(Regex(r"\d|[,.!]"), behavior, invert)
    digits = pre_tokenizers.Digits(individual_digits=invert)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, digits, pre_tokenizers.ByteLevel(add_prefix_space=True)])
    same(call, tokenizer, tmp_path / "tokenizer.json", [*_TEXTS, "1,,2..!!3 4", *random_texts(rng, 30)])


def test_unknown_tokens_and_ends(call: Call, tmp_path: Path, rng: np.random.Generator) -> None:
    from tokenizers.processors import TemplateProcessing

    for fuse in (True, False):
        tokenizer = Tokenizer(
            models.BPE(
                {"<unk>": 0, "a": 1, "b": 2, "ab": 3, "aab": 4},
                [("a", "b"), ("a", "ab")],
                unk_token="<unk>",
                fuse_unk=fuse,
            )
        )
        tokenizer.decoder = decoders.Fuse()
        tokenizer.add_special_tokens(["<s>", "</s>"])
        tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 5), ("</s>", 6)])
        texts = ["".join(rng.choice(list("aabbxy"), size=int(n))) for n in rng.integers(0, 20, size=40)]
        same(call, tokenizer, tmp_path / "tokenizer.json", texts)
        bare = call("encode", tokenizer=str(tmp_path / "tokenizer.json"), texts=texts, add_special=False)
        assert bare == [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


def _split(pattern: str) -> dict[str, Any]:
    return {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}}


_FLAGS = {"lstrip": False, "rstrip": False, "normalized": False}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "Lowercase"),
        ({"pre_tokenizer": {"type": "BertPreTokenizer"}}, "BertPreTokenizer"),
        ({"model": {"type": "WordPiece", "vocab": {}}}, "WordPiece"),
        ({"decoder": {"type": "WordPiece"}}, "WordPiece"),
        ({"decoder": None}, "null"),
        ({"post_processor": {"type": "BertProcessing"}}, "BertProcessing"),
        (_split(r"[a[bc]]"), "a class within a class"),
        (_split(r"\w+"), r"has \w"),
        (_split(r"a{1,2}+"), "}+"),
        (_split("(a"), "cannot be compiled"),
        ({"added_tokens": [{"id": 1, "content": "x", "special": True, **_FLAGS, "single_word": True}]}, "whole word"),
        ({"model": {"type": "BPE", "vocab": {}, "merges": [], "end_of_word_suffix": "</w>"}}, "end_of_word_suffix"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a a"]}}, "not of tokens"),
        ({"model": {"type": "BPE"}}, "damaged"),
        *(({"model": {"type": "BPE", "vocab": {"a": n}, "merges": []}}, "damaged") for n in (-1, 1.5, 1e300, 1 << 32)),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused_by_name(call: Call, tmp_path: Path, change: dict[str, Any], named: str) -> None:
    data = {**json.loads(byte_level("gpt-2").to_str()), **change}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(RuntimeError) as error:
        call("encode", tokenizer=str(path), texts=["a"])
    assert named in str(error.value)


def test_an_id_may_be_large(call: Call, tmp_path: Path) -> None:
    """Memory is taken for tokens, not for ids."""
    data = json.loads(byte_level("gpt-2").to_str())
    data |= {"model": {"type": "BPE", "vocab": {"a": (1 << 32) - 1}, "merges": []}, "added_tokens": []}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(data))
    assert call("encode", tokenizer=str(path), texts=["aba"]) == [[(1 << 32) - 1] * 2]
    assert call("decode", tokenizer=str(path), ids=[[(1 << 32) - 1, -1, 5]]) == [["a", "", "", ""]]


@pytest.mark.parametrize("part", ["decoder", "normalizer", "pre_tokenizer", "post_processor"])
def test_parts_that_are_nested_too_deeply(call: Call, tmp_path: Path, part: str) -> None:
    whole = json.dumps({**json.loads(byte_level("gpt-2").to_str()), part: 0})
    inner = {"decoder": "decoders", "normalizer": "normalizers", "pre_tokenizer": "pretokenizers"}
    step = f'{{"type": "Sequence", "{inner.get(part, "processors")}": ['
    path = tmp_path / "tokenizer.json"
    path.write_text(whole.replace(f'"{part}": 0', f'"{part}": {step * 100_000}{"]}" * 100_000}'))
    with pytest.raises(RuntimeError, match="damaged"):
        call("encode", tokenizer=str(path), texts=["a"])


def test_bytes_that_are_no_utf8_become_replacement_characters(
    call: Call, tmp_path: Path, rng: np.random.Generator
) -> None:
    tokenizer = byte_level("gpt-2")
    path = save(tokenizer, tmp_path / "tokenizer.json")
    alphabet = tokenizer.get_vocab()
    ids = [alphabet[character] for character, _ in sorted(BYTE_ALPHABET.items(), key=lambda pair: pair[1])]
    edges = [0xC1, 0xC2, 0xE0, 0xED, 0xEF, 0xF0, 0xF4, 0xF5, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xFF]
    lists = [[ids[int(i)] for i in rng.choice(edges if turn % 2 else 256, size=40)] for turn in range(60)]
    for tokens, pieces in zip(lists, call("decode", tokenizer=str(path), ids=lists), strict=True):
        assert "".join(pieces) == tokenizer.decode(tokens)


_TRAINING = [
    "The quick brown fox jumps over the lazy dog, and it's 1234 times they'll do so.",
    "Größe, façade, naïve: über alles. Привет, мир! Καλημέρα κόσμε.",
    "def main():\n    return {'a': 1, 'b': [2, 3]}\n\n\tprint(x)  # comment\n",
    "今天天气很好。こんにちは世界。안녕하세요 세계. नमस्ते दुनिया",
    "   spaces   and\ttabs \n\n newlines\r\n 3.14159 2,718,281 HelloWorld camelCaseWords",
]
_TEXTS = [
    *_TRAINING,
    *("", " ", "  ", "\n", "a", " a", "a ", "I'm you'Re WE'LL he'ſ", "1234567", "x\u0301 e\u0301 \u1112\u1161\u11ab"),
    *("👩‍👩‍👧‍👦 👍🏽 🇩🇪", "مرحبا بالعالم", "שלום", "ไทย", "\u200b\ufeff"),
    *("<|im_end|>a <|im_end|> b", "a <tool> b<tool>", "a  <|x|>  b <|x|>"),
    *("<s>x</s>", "a\x00b", "ÅÅ ﬁ ①", "0x1F == 31; // ok", "'\"`~!@#$%^&*()_+-=[]{}|;:,./<>?"),
]  # fmt: skip
