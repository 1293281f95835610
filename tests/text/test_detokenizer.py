"""Streaming never splits a character, and its pieces add up to the decoded text.

Draws: what is compared must be equal, whatever the numbers are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Rust
from tokenizers import decoders, models, pre_tokenizers

from transom.errors import OptionError
from transom.text import SpecialIds, Tokenizer
from transom.text.detokenizer import ByteDetokenizer, WindowDetokenizer
from transom.text.from_gguf import tokenizer_from_gguf

Make = Callable[..., Any]
LLAMA3 = r"'s|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"
quick = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece", "gemma"])
def tokenizer(
    request: pytest.FixtureRequest,
    train_byte_level: Make,
    gguf_metadata: Make,
    train_sentencepiece: Make,
    sentencepiece_metadata: Make,
) -> Tokenizer:
    if request.param == "byte-level":
        return tokenizer_from_gguf(gguf_metadata(train_byte_level(LLAMA3), "llama-bpe"))
    path = train_sentencepiece("bpe")
    return tokenizer_from_gguf(sentencepiece_metadata(path, add_space_prefix=request.param == "sentencepiece"))


def streamed(tokenizer: Tokenizer, ids: list[int], **options: bool) -> list[str]:
    stream = tokenizer.stream(**options)
    return [*(stream.push(token) for token in ids), stream.finish()]


@quick
@given(st.lists(st.integers(0, 10_000), max_size=40), st.booleans(), st.booleans())
def test_pieces_of_any_ids_add_up_to_the_whole(
    tokenizer: Tokenizer, numbers: list[int], skip_special: bool, continues: bool
) -> None:
    # Random ids are full of invalid byte sequences; ids past the vocabulary have no text
    ids = [number % (tokenizer.vocabulary_size + 3) for number in numbers]
    pieces = streamed(tokenizer, ids, skip_special=skip_special, continues=continues)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special=skip_special, continues=continues)


@quick
@given(st.text(max_size=60))
def test_any_text_comes_back_without_a_split_character(tokenizer: Tokenizer, text: str) -> None:
    pieces = streamed(tokenizer, tokenizer.encode(text, add_special=False), skip_special=False)
    whole = "".join(pieces)
    if tokenizer.spelling is not None and not tokenizer.spelling.byte_level:
        text, whole = text.replace("▁", " "), whole  # SentencePiece does not distinguish the two
    assert whole == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@quick
@given(st.lists(st.integers(0, 255), max_size=30))
def test_byte_tokens_decode_as_the_standard_library_decodes_bytes(tokenizer: Tokenizer, data: list[int]) -> None:
    by_bytes = {tokenizer.token_bytes(token): token for token in range(tokenizer.vocabulary_size)}
    ids = [by_bytes[bytes([byte])] for byte in data]
    expected = bytes(data).decode("utf-8", "replace")
    assert tokenizer.decode(ids, continues=True) == expected
    assert "".join(streamed(tokenizer, ids, continues=True)) == expected


def test_nasty_texts_come_back(tokenizer: Tokenizer, texts: list[str]) -> None:
    for text in texts:
        pieces = streamed(tokenizer, tokenizer.encode(text, add_special=False), skip_special=False)
        expected = text if tokenizer.spelling and tokenizer.spelling.byte_level else text.replace("▁", " ")
        assert "".join(pieces) == expected


def test_a_character_is_held_back_until_its_last_byte(train_byte_level: Make, gguf_metadata: Make) -> None:
    tokenizer = tokenizer_from_gguf(gguf_metadata(train_byte_level(LLAMA3, 300), "llama-bpe"))
    by_bytes = {tokenizer.token_bytes(token): token for token in range(tokenizer.vocabulary_size)}
    stream = tokenizer.stream()
    assert [stream.push(by_bytes[bytes([byte])]) for byte in "🙂a".encode()] == ["", "", "", "🙂", "a"]
    assert stream.push(by_bytes[b"\xf0"]) == ""
    assert stream.finish() == "\ufffd"
    assert stream.push(by_bytes[b"a"]) == "a", "a finished stream starts afresh"


def test_the_dummy_space_is_dropped_at_the_start_only(train_sentencepiece: Make, sentencepiece_metadata: Make) -> None:
    tokenizer = tokenizer_from_gguf(sentencepiece_metadata(train_sentencepiece("bpe")))
    ids = tokenizer.encode("the thing")
    assert tokenizer.decode(ids) == "the thing"
    assert tokenizer.decode(ids, continues=True) == " the thing"
    assert "".join(streamed(tokenizer, ids)) == "the thing"
    assert "".join(streamed(tokenizer, ids, continues=True)) == " the thing"


def test_the_cost_of_a_token_does_not_grow_with_the_text(tokenizer: Tokenizer) -> None:
    looked_up: list[int] = []

    class Counting(dict[int, bytes]):
        def __getitem__(self, token: int) -> bytes:
            looked_up.append(token)
            return b"ab "

    stream = ByteDetokenizer(Counting(), strip_start=1)
    for token in range(5000):
        stream.push(token)
    assert looked_up == list(range(5000))


@pytest.fixture(scope="module")
def word_pieces() -> Tokenizer:
    words = ["[UNK]", "[CLS]", "play", "##ing", "##ed", "the", "!", "un", "##able"]
    rust = Rust(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    rust.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    rust.decoder = decoders.WordPiece(cleanup=False)
    rust.add_special_tokens(["[UNK]", "[CLS]"])
    return Tokenizer(rust, SpecialIds())


@quick
@given(st.lists(st.integers(0, 8), max_size=20), st.booleans())
def test_a_decoder_without_bytes_streams_as_it_decodes(
    word_pieces: Tokenizer, ids: list[int], skip_special: bool
) -> None:
    assert word_pieces.spelling is None
    pieces = streamed(word_pieces, ids, skip_special=skip_special)
    assert "".join(pieces) == word_pieces.decode(ids, skip_special=skip_special)


def test_the_window_of_a_decoder_without_bytes_stays_short(word_pieces: Tokenizer) -> None:
    longest = 0

    def decode(ids: Any) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return "".join("x" for _ in ids)

    stream = WindowDetokenizer(decode)
    assert "".join(stream.push(token) for token in range(500)) + stream.finish() == "x" * 500
    assert longest <= 3


def test_a_negative_id_is_refused(tokenizer: Tokenizer, word_pieces: Tokenizer) -> None:
    for one in (tokenizer, word_pieces):
        with pytest.raises(OptionError, match="-1 is negative"):
            one.decode([-1])
