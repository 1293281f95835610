"""Each named pre-tokenizer splits text like its published pattern in another regular expression engine."""

from __future__ import annotations

import pytest
import regex

from transom.errors import SourceError
from transom.text.pre_tokenizers import PRE_TOKENIZERS, pre_tokenizer
from transom.text.spelling import BYTE_ALPHABET

# As published, and where possible spelled otherwise than ours: tiktoken's openai_public.py; mistral-common's
# tekken.json; the tokenizer.json of Qwen2 and SmolLM2. (Later tiktoken takes the white space at the end of a text as
# one word, `\s++$`, even across newlines. The models that took its pattern, llama 3 and phi-4, do not.)
GPT2 = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
CL100K = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"""
    r"""|\s*[\r\n]|\s+(?!\S)|\s"""
)
O200K = "|".join(
    [
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""\p{N}{1,3}""",
        r""" ?[^\s\p{L}\p{N}]+[\r\n/]*""",
        r"""\s*[\r\n]+""",
        r"""\s+(?!\S)""",
        r"""\s+""",
    ]
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PUBLISHED = {
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "llama-bpe": [CL100K],
    "dbrx": [CL100K],
    "gpt-4o": [O200K],
    "llama4": [O200K],
    "tekken": [TEKKEN],
    "qwen2": [QWEN2],
}


def published_cut(name: str, text: str) -> list[str]:
    words = [text] if text else []
    for pattern in PUBLISHED[name]:
        words = [part for word in words for part in _isolate(pattern, word)]
    return words


def _isolate(pattern: str, text: str) -> list[str]:
    parts, end = [], 0
    for match in regex.finditer(pattern, text):
        parts += [text[end : match.start()], match.group()]
        end = match.end()
    return [part for part in [*parts, text[end:]] if part]


def our_cut(name: str, text: str) -> list[bytes]:
    pieces = pre_tokenizer(name).build().pre_tokenize_str(text)
    return [bytes(BYTE_ALPHABET[character] for character in piece) for piece, _ in pieces]


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_text_is_cut_as_the_published_pattern_says(name: str, texts: list[str]) -> None:
    for text in texts:
        assert our_cut(name, text) == [word.encode() for word in published_cut(name, text)], repr(text)


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_every_named_pre_tokenizer_loses_nothing(name: str, texts: list[str]) -> None:
    for text in texts[:80]:
        assert b"".join(our_cut(name, text)) == text.encode(), repr(text)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("default", "a 12345.", ["a", " ", "123", "45", "."]),
        ("falcon", "a<b 12345", ["a", "<", "b", " ", "123", "45"]),
        ("deepseek-llm", "ab, 日本 12", ["ab", ",", " ", "日本", " ", "12"]),
        ("deepseek-v3", "1234 日本x.y", ["123", "4", " ", "日本", "x", ".y"]),
        ("deepseek-coder", "x1\n", ["x", "1", "\n"]),
        ("bloom", "Hi there, you", ["Hi", " there", ",", " you"]),
        ("command-r", "it's 42", ["it", "'s", " ", "4", "2"]),
        ("qwen35", "e\u0301a 1", ["e\u0301a", " ", "1"]),
        ("glm4", "it's 1234", ["it", "'s", " ", "123", "4"]),
        ("tiny_aya", "1234567", ["1", "234", "567"]),
        ("chameleon", "IMGIMGABZ", ["IMGIMGABZ"]),
        ("exaone-moe", "Hi you 12", ["Hi you", " ", "1", "2"]),
        ("seed-coder", "a!\n", ["a", "!", "\n"]),
        ("bailingmoe", "IT'S 12", ["IT", "'S", " ", "1", "2"]),
        ("laguna", "a\n\nb", ["a", "\n\n", "b"]),
    ],
)
def test_sample_text_is_cut_into_these_words(name: str, text: str, words: list[str]) -> None:
    assert our_cut(name, text) == [word.encode() for word in words]


def test_an_unknown_name_is_refused_with_the_nearest_and_all_known() -> None:
    with pytest.raises(SourceError) as caught:
        pre_tokenizer("llama-bqe")
    assert '"llama-bqe"' in caught.value.cause
    assert 'Did you mean "llama-bpe"?' in caught.value.fix
    assert "tekken" in caught.value.fix
