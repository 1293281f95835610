"""Calibration texts: what users may give, and how a text becomes pieces of token ids.

Draws: the numbers are only carried along; what is checked does not depend on them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import byte_llama
import pytest

from transom.errors import OptionError, SourceError
from transom.preparation import calibration_texts
from transom.preparation.calibration_texts import DEFAULT_PIECES, MAX_PIECES, PIECE_TOKENS, pieces, user_texts
from transom.sources import resolve
from transom.text import Tokenizer
from transom.text.tokenizer import SpecialIds

VOCABULARY = 262


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, shared_rng: Any) -> Tokenizer:
    """One token for each byte, and 256 to begin a text."""
    path = byte_llama.write_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", shared_rng("a model of bytes"))
    found = resolve(path).open(path).tokenizer
    assert found is not None
    return Tokenizer(found._rust, SpecialIds(bos=256, eos=257, add_bos=True))


def test_texts_and_files_are_taken_in_order(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("from a file, ö", encoding="utf-8")
    assert user_texts(["one", path, "three"]) == ("one", "from a file, ö", "three")
    assert user_texts([]) == ()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("a text", "is a str, not a list"),
        (Path("text.txt"), "not a list"),
        (3, "is a int, not a list"),
        ([b"bytes"], "holds a bytes"),
        (["a", " \n"], "Text 2 of calibration is empty"),
        (["a"] * (MAX_PIECES + 1), f"holds {MAX_PIECES + 1} texts"),
    ],
)
def test_a_value_that_is_not_a_list_of_texts_is_refused(given: Any, said: str) -> None:
    with pytest.raises(OptionError, match=said) as caught:
        user_texts(given)
    assert caught.value.fix


def test_the_name_of_a_file_is_not_taken_for_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "text.txt"
    path.write_text("from a file")
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in (str(path), "~/text.txt"):
        with pytest.raises(OptionError, match=r"the name of the file .*text\.txt") as caught:
            user_texts(["a text", given])
        assert f"calibration=[Path('{given}')]" in caught.value.fix
    for text in (f"{path}\n{path}", str(tmp_path), "zero\0byte", "long " * 10_000):
        assert user_texts([text])


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(SourceError, match="latin is not UTF-8"):
        user_texts([tmp_path / "latin"])
    with pytest.raises(SourceError, match="none cannot be read"):
        user_texts([tmp_path / "none"])


def test_no_more_of_a_text_is_kept_than_is_looked_at(tokenizer: Tokenizer) -> None:
    whole = "words and " * 500_000
    [kept] = user_texts([whole])
    assert len(kept) < len(whole)
    found = pieces(tokenizer, VOCABULARY, 4096, [kept])
    assert len(found) == MAX_PIECES
    assert {len(piece) for piece in found} == {PIECE_TOKENS}
    assert len(pieces(tokenizer, VOCABULARY, 4096, user_texts([whole] * 3))) == MAX_PIECES // 3 * 3


def test_pieces_begin_as_the_tokenizer_begins_a_text_and_hold_the_text(tokenizer: Tokenizer) -> None:
    text = "".join(chr(97 + i % 26) for i in range(600))
    found = pieces(tokenizer, VOCABULARY, 4096, [text, "short"])
    assert [piece[0] for piece in found] == [256] * 4
    assert bytes(i for piece in found[:3] for i in piece[1:]).decode() == text
    assert bytes(found[3][1:]) == b"short"
    plain = Tokenizer(tokenizer._rust, SpecialIds(bos=256))
    assert pieces(plain, VOCABULARY, 4096, ["short"]) == (tuple(b"short"),)


@pytest.mark.parametrize("context", [1, 2, 100, 256, 5000])
def test_without_texts_there_are_passages_as_long_as_the_context_allows(tokenizer: Tokenizer, context: int) -> None:
    found = pieces(tokenizer, VOCABULARY, context, [])
    assert [len(piece) for piece in found] == [min(PIECE_TOKENS, context)] * DEFAULT_PIECES
    assert len(set(found)) == (DEFAULT_PIECES if context > 99 else len(set(found)))
    assert found == pieces(tokenizer, VOCABULARY, context, [])


def test_token_ids_lie_in_the_vocabulary(tokenizer: Tokenizer) -> None:
    assert pieces(tokenizer, 110, 4096, ["zebra", "ab"]) == (tuple(b"eba"), tuple(b"ab"))  # 256 begins a text, 110 is n
    with pytest.raises(OptionError, match="Text 2 of calibration has no token"):
        pieces(tokenizer, 110, 4096, ["ab", "zzz"])


def test_special_tokens_in_a_text_are_spelled_out(tokenizer: Tokenizer) -> None:
    [piece] = pieces(tokenizer, VOCABULARY, 4096, ["<|end|>"])
    assert bytes(piece[1:]) == b"<|end|>"


def test_a_model_without_a_tokenizer_gets_none_and_refuses_texts() -> None:
    assert pieces(None, VOCABULARY, 4096, []) == ()
    with pytest.raises(OptionError, match="has no tokenizer"):
        pieces(None, VOCABULARY, 4096, ["text"])


def test_a_python_without_its_passages_gives_none(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking() -> dict[str, str]:
        raise OptionError("This Python comes without texts")

    monkeypatch.setattr(calibration_texts, "default_texts", lacking)
    assert pieces(tokenizer, VOCABULARY, 4096, []) == ()
