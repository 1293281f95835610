"""The tokenizer itself: bad input, saving and loading, threads."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Rust
from tokenizers import decoders

from transom.errors import OptionError, SourceError
from transom.text import SpecialIds, Tokenizer
from transom.text.from_gguf import tokenizer_from_gguf
from transom.text.spelling import Spelling, spelling_of

Make = Callable[..., Any]


@pytest.fixture(scope="session")
def smol(smollm2: dict[str, Any]) -> Tokenizer:
    return tokenizer_from_gguf(smollm2)


def test_a_saved_tokenizer_loads_as_it_was(smol: Tokenizer, texts: list[str], tmp_path: Path) -> None:
    smol.save(tmp_path / "tokenizer.bin")
    loaded = Tokenizer.load(tmp_path / "tokenizer.bin")
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.bin"], "a temporary file was left"
    assert json.loads(loaded.to_json()) == json.loads(smol.to_json())
    assert repr(loaded) == repr(smol)
    assert loaded.special_tokens == smol.special_tokens
    for text in texts:
        assert loaded.encode(text) == smol.encode(text)


def test_sentencepiece_and_unigram_survive_saving(
    train_sentencepiece: Make, sentencepiece_metadata: Make, texts: list[str], tmp_path: Path
) -> None:
    for kind, model in (("bpe", "llama"), ("unigram", "t5")):
        made = tokenizer_from_gguf(sentencepiece_metadata(train_sentencepiece(kind), model=model))
        made.save(tmp_path / kind)
        loaded = Tokenizer.load(tmp_path / kind)
        assert [loaded.encode(text) for text in texts] == [made.encode(text) for text in texts]
        assert (loaded.add_bos, loaded.add_eos, loaded.spelling) == (made.add_bos, made.add_eos, made.spelling)


def test_merges_of_tokens_with_spaces_survive_saving(tmp_path: Path) -> None:
    description = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "BPE", "vocab": {" ": 0, "a": 1, " a": 2}, "merges": [[" ", "a"]]},
    }
    made = Tokenizer(Rust.from_str(json.dumps(description)), SpecialIds())
    made.save(tmp_path / "tokenizer.bin")
    assert Tokenizer.load(tmp_path / "tokenizer.bin").encode("a a") == made.encode("a a") == [1, 2]


@pytest.mark.parametrize("damage", ["empty", "cut", "foreign", "version", "missing"])
def test_a_damaged_file_is_refused(damage: str, smol: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.bin"
    smol.save(path)
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(
            {
                "empty": b"",
                "cut": data[: len(data) // 2],
                "foreign": b'{"a": 1}\n{}',
                "version": data.replace(b'"version": 1', b'"version": 9', 1),
            }[damage]
        )
    with pytest.raises(SourceError) as caught:
        Tokenizer.load(path)
    assert str(path) in caught.value.cause
    assert caught.value.fix


def test_saving_where_nothing_can_be_written_leaves_no_rest(smol: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="tokenizer"):
        smol.save(tmp_path / "no-such-folder" / "tokenizer.bin")
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        smol.save(tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (b"bytes", "of type bytes"),
        (None, "of type NoneType"),
        (b"caf\xe9".decode("utf-8", "surrogateescape"), "character 3 is the lone surrogate"),
        ("ok \ud83d", "character 3 is the lone surrogate"),
    ],
)
def test_text_that_is_not_unicode_is_refused(text: Any, cause: str, smol: Tokenizer) -> None:
    with pytest.raises(OptionError) as caught:
        smol.encode(text)
    assert cause in caught.value.cause
    assert caught.value.fix


def test_an_empty_text_is_no_token(smol: Tokenizer) -> None:
    assert smol.encode("") == []
    assert smol.decode([]) == ""


def test_truncation_and_padding_of_the_trainer_are_switched_off(smol: Tokenizer) -> None:
    rust = Rust.from_str(smol.to_json())
    rust.enable_truncation(4)
    rust.enable_padding(length=10)
    assert len(Tokenizer(rust, SpecialIds()).encode("one two three four five six seven")) == 7


def test_calls_with_unlike_options_from_many_threads_do_not_disturb_one_another(smol: Tokenizer) -> None:
    text = "<|im_start|>user\nHello<|im_end|>"
    read, spelled = smol.encode(text), smol.encode(text, parse_special=False)
    assert read != spelled

    def work(number: int) -> bool:
        parse = bool(number % 2)
        return smol.encode(text, parse_special=parse) == (read if parse else spelled) and smol.decode(read) != ""

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(800)))


def test_tokens_for_shows_each_token_with_its_own_bytes(smol: Tokenizer) -> None:
    pieces = smol.tokens_for("Hi 🙂<|im_end|>")
    assert b"".join(piece.data for piece in pieces).decode() == "Hi 🙂<|im_end|>"
    assert [piece.special for piece in pieces][-1]
    assert [piece.id for piece in pieces] == smol.encode("Hi 🙂<|im_end|>")


def test_ids_and_tokens_are_found_both_ways(smol: Tokenizer) -> None:
    assert smol.token_to_id("<|im_end|>") == 2
    assert smol.id_to_token(2) == "<|im_end|>"
    assert smol.token_to_id("no such token") is None
    assert smol.id_to_token(smol.vocabulary_size) is None
    assert smol.id_to_token(-1) is None
    assert smol.token_bytes(2) == b"<|im_end|>"
    assert smol.token_bytes(smol.vocabulary_size + 5) == b""
    assert smol.special_tokens == {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
    }


def test_every_usual_decoder_has_a_spelling() -> None:
    llama = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    assert spelling_of(llama.__getstate__()) == Spelling(False, True, (("▁", " "),), 0)
    with_strip = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    assert spelling_of(with_strip.__getstate__()) == Spelling(False, True, (("▁", " "),), 1)
    assert spelling_of(decoders.ByteLevel().__getstate__()) == Spelling(byte_level=True)
    assert spelling_of(decoders.Metaspace().__getstate__()) == Spelling(False, False, (("▁", " "),), 1)
    metaspace = decoders.Metaspace(prepend_scheme="never")
    assert spelling_of(metaspace.__getstate__()) == Spelling(False, False, (("▁", " "),), 0)
    for unknown in (decoders.WordPiece(), decoders.BPEDecoder(), decoders.CTC(), decoders.Strip(" ", 1, 0)):
        assert spelling_of(unknown.__getstate__()) is None
    assert spelling_of(None) is None


def test_importing_the_package_imports_neither_tokenizers_nor_jinja() -> None:
    code = (
        "import sys, transom.text, transom.text.from_gguf, transom.text.from_hf; "
        "print([name for name in ('tokenizers', 'jinja2', 'numpy', 'gguf') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
