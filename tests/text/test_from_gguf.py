"""Tokenizers built from GGUF metadata agree with the tokenizers the metadata was made from.

Draws: tokens are equal. Of unigrams the scores are: two splits with equal scores are both correct.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from tokenizers import Tokenizer as Rust
from tokenizers import decoders, models, pre_tokenizers

from transom.errors import SourceError
from transom.text.from_gguf import chat_template_from_gguf, tokenizer_from_gguf

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
Make = Callable[..., Any]


@pytest.fixture(scope="session")
def independent_smollm2(smollm2: dict[str, Any]) -> Rust:
    """SmolLM2's tokenizer built by hand, as its published tokenizer.json describes it."""
    tokens = smollm2["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in smollm2["tokenizer.ggml.merges"]]
    built = Rust(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens(tokens[:17])
    return built


def test_smollm2_agrees_with_an_independent_build_on_prose_and_on_nasty_text(
    smollm2: dict[str, Any], independent_smollm2: Rust, texts: list[str]
) -> None:
    from pydoc_data.topics import topics

    ours = tokenizer_from_gguf(smollm2)
    prose = "\n\n".join(topics[name] for name in sorted(topics))
    chat = "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n"
    for text in [prose, chat, *texts]:
        ids = ours.encode(text)
        assert ids == independent_smollm2.encode(text).ids, repr(text[:200])
        assert ours.decode(ids, skip_special=False) == text
        assert ours.decode(ids) == independent_smollm2.decode(ids)
    assert ours.vocabulary_size == 49152
    assert (ours.bos_id, ours.eos_id, ours.unk_id, ours.pad_id) == (1, 2, 0, 2)
    assert not ours.add_bos
    assert len(ours.special_ids) == 17


@pytest.mark.parametrize("pre", ["llama-bpe", "dbrx"])
def test_byte_level_agrees_with_the_tokenizer_it_was_trained_as(
    pre: str, train_byte_level: Make, gguf_metadata: Make, texts: list[str]
) -> None:
    trained = train_byte_level(LLAMA3)
    ours = tokenizer_from_gguf(gguf_metadata(trained, pre, add_bos_token=False))
    for text in texts:
        assert ours.encode(text) == trained.encode(text).ids, repr(text)
        assert ours.decode(ours.encode(text), skip_special=False) == text


def test_qwen2_normalizes_to_nfc_as_its_own_tokenizer_does(train_byte_level: Make, gguf_metadata: Make) -> None:
    ours = tokenizer_from_gguf(gguf_metadata(train_byte_level(LLAMA3), "qwen2"))
    assert ours.encode("e\u0301") == ours.encode("é")


def test_a_word_that_is_a_token_is_taken_whole_only_where_the_family_says_so(
    train_byte_level: Make, gguf_metadata: Make
) -> None:
    metadata = gguf_metadata(train_byte_level(LLAMA3), "llama-bpe", add_bos_token=False)
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "zqxjkv"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 1]
    last = len(metadata["tokenizer.ggml.tokens"]) - 1
    assert tokenizer_from_gguf(metadata).encode("zqxjkv") == [last]
    assert len(tokenizer_from_gguf({**metadata, "tokenizer.ggml.pre": "dbrx"}).encode("zqxjkv")) > 1


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_bpe_agrees_with_sentencepiece(
    prefix: bool, train_sentencepiece: Make, sentencepiece_metadata: Make, texts: list[str]
) -> None:
    path = train_sentencepiece("bpe", add_dummy_prefix=prefix)
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ours = tokenizer_from_gguf(sentencepiece_metadata(path, add_space_prefix=prefix, add_bos_token=True))
    for text in texts:
        if "▁" in text or "\0" in text:  # SentencePiece does not distinguish it from a space; its C strings end at NUL
            continue
        ids = ours.encode(text, add_special=False)
        assert ids == oracle.encode(text), repr(text)
        assert ours.encode(text) == [oracle.bos_id(), *ids]
        assert ours.decode(ids) == text


def test_unigram_agrees_with_sentencepiece(
    train_sentencepiece: Make, sentencepiece_metadata: Make, texts: list[str]
) -> None:
    path = train_sentencepiece("unigram")
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ours = tokenizer_from_gguf(sentencepiece_metadata(path, model="t5", add_eos_token=True, eos_token_id=2))
    for text in texts:
        if (
            "▁" in text or "\0" in text or "<0x" in text
        ):  # the last: the package reads it as a byte where "<" is unknown
            continue
        ids = ours.encode(text, add_special=False)
        theirs = oracle.encode(text)
        assert oracle.decode(ids) == oracle.decode(theirs), repr(text)
        # With equal scores, either split may result. SentencePiece adds scores in float32: 6e-8 of the sum each time.
        scores = [sum(oracle.get_score(i) for i in split) for split in (ids, theirs)]
        assert scores[0] == pytest.approx(scores[1], rel=6e-8 * max(1, len(ids))), repr(text)
        assert ours.decode(ids) == text
    assert ours.encode("a")[-1] == 2


def test_gemma_has_no_dummy_prefix_and_takes_runs_of_spaces_whole(
    train_sentencepiece: Make, sentencepiece_metadata: Make
) -> None:
    metadata = sentencepiece_metadata(train_sentencepiece("bpe"), add_space_prefix=False)
    size = len(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.tokens"] += ["  ", "   ", "\n\n"]  # as llama.cpp's converter writes user-defined tokens
    metadata["tokenizer.ggml.scores"] += [0.0, 0.0, 0.0]
    metadata["tokenizer.ggml.token_type"] += [4, 4, 4]
    ours = tokenizer_from_gguf(metadata)
    ids = ours.encode("a   b\n\nc  ", add_special=False)
    assert [token - size for token in ids if token >= size] == [1, 2, 0]
    assert ours.decode(ids) == "a   b\n\nc  "
    assert ours.decode(ours.encode("the", add_special=False)) == "the"


def test_gemma4_uses_its_own_merges_over_raw_text() -> None:
    tokens = [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        "▁",
        "a",
        "b",
        "▁a",
        "\n",
        *(f"<0x{byte:02X}>" for byte in range(256)),
    ]
    ours = tokenizer_from_gguf(
        {
            "tokenizer.ggml.model": "gemma4",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [3, 3, 3, 3, 1, 1, 1, 1, 1, *[6] * 256],
            "tokenizer.ggml.merges": ["▁ a"],
            "tokenizer.ggml.bos_token_id": 2,
            "tokenizer.ggml.eos_token_id": 1,
            "tokenizer.ggml.unknown_token_id": 3,
        }
    )
    assert ours.encode("b a\né") == [2, 6, 7, 8, 9 + 0xC3, 9 + 0xA9]
    assert ours.decode([2, 6, 7, 8, 9 + 0xC3, 9 + 0xA9]) == "b a\né"


def test_characters_without_a_token_become_bytes_and_come_back(
    train_sentencepiece: Make, sentencepiece_metadata: Make
) -> None:
    ours = tokenizer_from_gguf(sentencepiece_metadata(train_sentencepiece("bpe")))
    ids = ours.encode("\U0001f9ff", add_special=False)
    assert [ours.token_bytes(token) for token in ids][-4:] == [b"\xf0", b"\x9f", b"\xa7", b"\xbf"]
    assert ours.decode(ids) == "\U0001f9ff"


def test_control_tokens_in_the_text_are_read_or_spelled_out_as_asked(smollm2: dict[str, Any]) -> None:
    ours = tokenizer_from_gguf(smollm2)
    text = "say <|im_end|> now"
    assert 2 in ours.encode(text)
    spelled = ours.encode(text, parse_special=False)
    assert not set(spelled) & ours.special_ids
    assert ours.decode(spelled) == text
    assert 2 in ours.encode(text), "the choice of one call leaked into the next"


def test_plain_text_never_makes_a_control_token_of_a_sentencepiece_vocabulary(
    train_sentencepiece: Make, sentencepiece_metadata: Make
) -> None:
    ours = tokenizer_from_gguf(sentencepiece_metadata(train_sentencepiece("bpe")))
    ids = ours.encode("a <s> b </s> <0x0A>", add_special=False, parse_special=False)
    assert not set(ids) & ours.special_ids
    assert ours.decode(ids) == "a <s> b </s> <0x0A>"


def test_user_defined_tokens_are_matched_whole_but_are_text(train_byte_level: Make, gguf_metadata: Make) -> None:
    metadata = gguf_metadata(train_byte_level(LLAMA3), "dbrx")
    size = len(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "<think>", "<|end|>", "éé"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 4, 4, 4]
    ours = tokenizer_from_gguf(metadata)
    assert ours.encode("<think>éé<|end|>", parse_special=True) == [size, size + 2, size + 1]
    assert ours.decode([size, size + 2]) == "<think>éé"
    assert ours.decode([size + 1]) == "", "an end-of-turn token that was marked user-defined is still control"


def test_the_ends_follow_the_flags_and_the_defaults_of_the_kind(
    train_byte_level: Make, gguf_metadata: Make, train_sentencepiece: Make, sentencepiece_metadata: Make
) -> None:
    trained = train_byte_level(LLAMA3)
    ends = {"bos_token_id": 0, "eos_token_id": 1}
    plain = trained.encode("Hi").ids
    for pre, flags, expected in [
        ("llama-bpe", {}, [0, *plain]),  # llama 3 adds it if the file does not state it
        ("llama-bpe", {"add_bos_token": False}, plain),
        ("dbrx", {}, plain),
        ("dbrx", {"add_bos_token": True, "add_eos_token": True}, [0, *plain, 1]),
    ]:
        ours = tokenizer_from_gguf(gguf_metadata(trained, pre, **ends, **flags))
        assert ours.encode("Hi") == expected
        assert ours.encode("Hi", add_special=False) == plain
        assert (ours.add_bos, ours.add_eos) == (expected[0] == 0, expected[-1] == 1)
        assert [*ours.beginning, *plain] == expected[: len(ours.beginning) + len(plain)]
    no_bos = tokenizer_from_gguf(gguf_metadata(trained, "llama-bpe", bos_token_id=0xFFFFFFFF))
    assert no_bos.encode("Hi") == plain
    assert no_bos.bos_id is None
    assert no_bos.beginning == []
    spm = tokenizer_from_gguf(sentencepiece_metadata(train_sentencepiece("bpe")))
    assert (spm.unk_id, spm.bos_id, spm.eos_id, spm.add_bos, spm.add_eos) == (0, 1, 2, True, False)
    assert spm.encode("") == [1]


def test_phi3_control_tokens_swallow_the_white_space_after_them(
    train_sentencepiece: Make, sentencepiece_metadata: Make
) -> None:
    metadata = sentencepiece_metadata(train_sentencepiece("bpe"))
    size = len(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.tokens"] += ["<|user|>"]
    metadata["tokenizer.ggml.scores"] += [0.0]
    metadata["tokenizer.ggml.token_type"] += [3]
    phi3 = tokenizer_from_gguf({**metadata, "general.architecture": "phi3"})
    llama = tokenizer_from_gguf({**metadata, "general.architecture": "llama"})
    assert phi3.encode("<|user|>\nHi") == phi3.encode("<|user|>Hi")
    assert llama.encode("<|user|>\nHi") != llama.encode("<|user|>Hi")
    assert phi3.encode("<|user|>Hi")[1] == size


def test_numbers_may_be_numpy_values(train_sentencepiece: Make, sentencepiece_metadata: Make) -> None:
    metadata = sentencepiece_metadata(train_sentencepiece("bpe"))
    arrays = {
        **metadata,
        "tokenizer.ggml.scores": np.array(metadata["tokenizer.ggml.scores"], np.float32),
        "tokenizer.ggml.token_type": np.array(metadata["tokenizer.ggml.token_type"], np.int32),
        "tokenizer.ggml.bos_token_id": np.uint32(1),
    }
    assert tokenizer_from_gguf(arrays).encode("Hello") == tokenizer_from_gguf(metadata).encode("Hello")


def test_repeated_characters_merge_as_sentencepiece_merges_them(
    train_sentencepiece: Make, sentencepiece_metadata: Make, dice: random.Random
) -> None:
    path: Path = train_sentencepiece("bpe")
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ours = tokenizer_from_gguf(sentencepiece_metadata(path))
    for _ in range(300):
        text = "".join(dice.choice("a =-.\n") * dice.randint(1, 19) for _ in range(3))
        assert ours.encode(text, add_special=False) == oracle.encode(text), repr(text)


def test_named_templates_come_out_of_the_metadata(smollm2: dict[str, Any]) -> None:
    tokenizer = tokenizer_from_gguf(smollm2)
    template = chat_template_from_gguf({**smollm2, "tokenizer.chat_template.tool_use": "{{ bos_token }}"}, tokenizer)
    assert template is not None
    assert template.names == ["default", "tool_use"]
    assert template.render([], template="tool_use") == "<|im_start|>"
    assert chat_template_from_gguf({}, tokenizer) is None


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"model": None}, "has no tokenizer"),
        ({"model": "bert"}, 'of the kind "bert"'),
        ({"pre": "llama-bqe"}, 'pre-tokenizer "llama-bqe"'),
        ({"pre": None}, "does not name its pre-tokenizer"),
        ({"tokens": None}, "has no vocabulary"),
        ({"tokens": []}, "has no vocabulary"),
        ({"merges": None}, "without merges"),
        ({"merges": ["no-such merge"]}, "the merge 'no-such merge'"),
        ({"token_type": [1, 1]}, "2 values in tokenizer.ggml.token_type"),
        ({"bos_token_id": 10_000_000}, "bos_token_id is 10000000"),
    ],
)
def test_metadata_that_is_unknown_or_damaged_is_refused_in_one_sentence(
    change: dict[str, Any], cause: str, train_byte_level: Make, gguf_metadata: Make
) -> None:
    metadata = gguf_metadata(train_byte_level(LLAMA3), "llama-bpe")
    for key, value in change.items():
        metadata[f"tokenizer.ggml.{key}"] = value
        if value is None:
            del metadata[f"tokenizer.ggml.{key}"]
    with pytest.raises(SourceError) as caught:
        tokenizer_from_gguf(metadata)
    assert cause in caught.value.cause
    assert caught.value.fix


def test_two_tokens_of_one_name_are_refused(train_byte_level: Make, gguf_metadata: Make) -> None:
    metadata = gguf_metadata(train_byte_level(LLAMA3), "llama-bpe")
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"][:-1], metadata["tokenizer.ggml.tokens"][5]]
    with pytest.raises(SourceError, match=r"ids 5 and \d+ are both"):
        tokenizer_from_gguf(metadata)


def test_a_padding_id_past_the_vocabulary_is_taken_as_none(train_byte_level: Make, gguf_metadata: Make) -> None:
    metadata = gguf_metadata(train_byte_level(LLAMA3), "llama-bpe", padding_token_id=10_000_000)
    assert tokenizer_from_gguf(metadata).pad_id is None


def test_a_missing_pre_tokenizer_can_be_named_by_hand(train_byte_level: Make, gguf_metadata: Make) -> None:
    metadata = gguf_metadata(train_byte_level(LLAMA3), "llama-bpe")
    del metadata["tokenizer.ggml.pre"]
    assert tokenizer_from_gguf(metadata, pre="llama-bpe").encode("Hello 1234")
