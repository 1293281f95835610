"""The tokenizer: text to token ids and back, on the `tokenizers` package.

Everything about encoding, special tokens at the ends included, lives in the wrapped object, so that one file brings
it all back. Decoding is done on bytes (`transom.text.spelling`): a stream and a whole decode alike, and nothing is
tidied up afterwards, so text that was encoded comes back as it was.

On the warm start-up path: `load` reads one file and builds nothing in Python.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from transom.errors import OptionError, SourceError
from transom.text.detokenizer import ByteDetokenizer, Detokenizer, WindowDetokenizer
from transom.text.spelling import Spelling, spelling_of

if TYPE_CHECKING:
    import tokenizers

_FORMAT = "transom-tokenizer"
_FORMAT_VERSION = 1


class SpecialIds(NamedTuple):
    """The ids with a role, None where the model has none, and which of them `encode` adds by itself."""

    bos: int | None = None
    eos: int | None = None
    unk: int | None = None
    pad: int | None = None
    add_bos: bool = False
    add_eos: bool = False


class TokenPiece(NamedTuple):
    """One token of an encoded text, for showing."""

    id: int
    text: str
    """Its own text; U+FFFD where it is part of a character."""
    data: bytes
    special: bool


class Tokenizer:
    """Text to token ids and back.

    Args:
        rust: the encoder; its post-processor must add the special tokens that `ids` says are added.
            Truncation and padding are switched off.
        ids: the ids with a role.
        vocabulary_size: one more than the largest id. Counted where not given, which costs a pass over the vocabulary.

    Methods may be called from several threads at once.
    """

    def __init__(self, rust: tokenizers.Tokenizer, ids: SpecialIds, vocabulary_size: int | None = None) -> None:
        # A tokenizer.json may carry its trainer's settings; a prompt cut short in silence is the worst answer.
        rust.no_truncation()
        rust.no_padding()
        if vocabulary_size is None:
            vocabulary_size = max(rust.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self._rust = rust
        self._ids = ids
        self._vocabulary_size = vocabulary_size
        self._lock = threading.Lock()

    # ---------------------------------------------------------------- encoding

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            text: any Unicode text; may be empty.
            add_special: add the beginning and end tokens the model was trained with (`add_bos`, `add_eos`). A
                rendered chat template already holds them: pass False.
            parse_special: read `<|im_end|>` and the like in the text as special tokens. Pass False for text that a
                user may have written, and it is spelled out instead.

        Raises:
            OptionError: the text is not a `str`, or holds surrogates, as bytes that are not UTF-8 leave behind.
        """
        _check_text(text)
        with self._lock:
            if self._rust.encode_special_tokens == parse_special:  # the property says "encode them as plain text"
                self._rust.encode_special_tokens = not parse_special
            return list(self._rust.encode(text, add_special_tokens=add_special).ids)

    def tokens_for(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[TokenPiece]:
        """The tokens of a text, each with its own text and bytes. Raises what `encode` raises."""
        pieces = []
        for token in self.encode(text, add_special=add_special, parse_special=parse_special):
            data = self.token_bytes(token)
            pieces.append(TokenPiece(token, data.decode(errors="replace"), data, token in self.special_ids))
        return pieces

    # ---------------------------------------------------------------- decoding

    def decode(self, ids: Iterable[int], *, skip_special: bool = True, continues: bool = False) -> str:
        """Text of token ids. Bytes that are no UTF-8 become U+FFFD; an id without a token yields nothing.

        Args:
            ids: token ids, each 0 or more.
            skip_special: leave special tokens out.
            continues: the ids go on from text before them, so a leading space is theirs. Without it, the dummy space
                that some vocabularies put before a text is dropped.

        Raises:
            OptionError: an id is negative.
        """
        skip = self.special_ids if skip_special else frozenset[int]()
        if self.spelling is None:
            return self._decode_whole([token for token in ids if token not in skip])
        pieces = self._pieces
        data = b"".join([pieces[token] for token in ids if token not in skip])
        spaces = 0 if continues else self.spelling.strip_start
        while spaces and data.startswith(b" "):
            data, spaces = data[1:], spaces - 1
        return data.decode("utf-8", "replace")

    def stream(self, *, skip_special: bool = True, continues: bool = False) -> Detokenizer:
        """A new incremental detokenizer; the arguments are those of `decode`, and so is the concatenated text."""
        skip = self.special_ids if skip_special else frozenset[int]()
        if self.spelling is None:
            return WindowDetokenizer(self._decode_whole, skip)
        return ByteDetokenizer(self._pieces, skip, 0 if continues else self.spelling.strip_start)

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for, special tokens by their own text; empty for an id without a token.

        Raises:
            OptionError: the id is negative.
        """
        return self._pieces[token]

    def token_to_id(self, token: str) -> int | None:
        """The id of a token, given as the vocabulary writes it, or None."""
        found: int | None = self._rust.token_to_id(token)
        return found

    def id_to_token(self, token: int) -> str | None:
        """The token of an id, as the vocabulary writes it, or None."""
        found: str | None = self._rust.id_to_token(token) if 0 <= token < 1 << 32 else None
        return found

    # ---------------------------------------------------------------- facts

    @property
    def vocabulary_size(self) -> int:
        """One more than the largest id that has a token. A model's logits may be wider."""
        return self._vocabulary_size

    @property
    def bos_id(self) -> int | None:
        return self._ids.bos

    @property
    def eos_id(self) -> int | None:
        """The end-of-text token. Where generation ends is `GenerationDefaults.eos_ids`."""
        return self._ids.eos

    @property
    def unk_id(self) -> int | None:
        return self._ids.unk

    @property
    def pad_id(self) -> int | None:
        return self._ids.pad

    @property
    def add_bos(self) -> bool:
        """Whether `encode` begins with the beginning token."""
        return self._ids.add_bos

    @property
    def add_eos(self) -> bool:
        """Whether `encode` ends with the end token."""
        return self._ids.add_eos

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of control tokens: never text, skipped by `decode`."""
        return frozenset(token for token, added in self._added.items() if added.special)

    @property
    def special_tokens(self) -> dict[str, str]:
        """The variables chat templates expect: `bos_token`, `eos_token`, `unk_token`, `pad_token`, where they exist."""
        roles = {"bos": self._ids.bos, "eos": self._ids.eos, "unk": self._ids.unk, "pad": self._ids.pad}
        texts = {role: self.id_to_token(token) for role, token in roles.items() if token is not None}
        return {f"{role}_token": text for role, text in texts.items() if text is not None}

    @cached_property
    def spelling(self) -> Spelling | None:
        """How tokens spell bytes, or None where tokens have no bytes of their own."""
        decoder = self._rust.decoder
        return None if decoder is None else spelling_of(decoder.__getstate__())

    def to_json(self) -> str:
        """The Hugging Face `tokenizer.json` of this tokenizer."""
        text: str = self._rust.to_str()
        return text

    def __repr__(self) -> str:
        kind = type(self._rust.model).__name__
        return f"<Tokenizer {kind}, {self._vocabulary_size} tokens, bos {self.bos_id}, eos {self.eos_id}>"

    # ---------------------------------------------------------------- files

    def header(self) -> str:
        """What a `tokenizer.json` does not say, as JSON."""
        return json.dumps(
            {
                "format": _FORMAT,
                "version": _FORMAT_VERSION,
                "ids": self._ids._asdict(),
                "vocabulary_size": self._vocabulary_size,
            }
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the compact form that `load` reads, in one step.

        Raises:
            OSError: the file cannot be written.
        """
        import tempfile

        path = Path(path)
        handle, temporary = tempfile.mkstemp(prefix=path.name, suffix=".part", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(self.header().encode() + b"\n" + _quick_json(self.to_json()).encode())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Read what `save` wrote.

        Raises:
            SourceError: no such file, another format, or a damaged one.
        """
        try:
            header, _, body = Path(path).read_bytes().partition(b"\n")
        except OSError as error:
            raise SourceError(f"{path} cannot be read: {error.strerror}", "Check the path") from error
        return cls.joined(header, body, path)

    @classmethod
    def joined(cls, header: bytes, body: bytes, path: str | os.PathLike[str]) -> Tokenizer:
        """Put together what `header` and `to_json` gave.

        Args:
            path: where the text was, for errors.

        Raises:
            SourceError: one of them is of another format, or damaged.
        """
        from tokenizers import Tokenizer as Rust

        damaged = f"{path} is not a tokenizer that Transom wrote, or it is damaged"
        fix = "Delete it, and it is made again from the model"
        try:
            facts: dict[str, Any] = json.loads(header)
            if facts["format"] != _FORMAT or facts["version"] != _FORMAT_VERSION:
                raise SourceError(damaged, fix)
            ids, size = SpecialIds(**facts["ids"]), int(facts["vocabulary_size"])
        except (ValueError, KeyError, TypeError) as error:
            raise SourceError(damaged, fix) from error
        try:
            rust = Rust.from_buffer(body)
        except Exception as error:  # the package raises plain Exception (and nothing finer) on a bad description
            raise SourceError(damaged, fix, [str(error)]) from error
        return cls(rust, ids, size)

    # ---------------------------------------------------------------- inside

    @cached_property
    def _added(self) -> dict[int, tokenizers.AddedToken]:
        return dict(self._rust.get_added_tokens_decoder())

    @cached_property
    def _pieces(self) -> _Pieces:
        return _Pieces(self)

    def _decode_whole(self, ids: Sequence[int]) -> str:
        if ids and min(ids) < 0:
            raise OptionError(f"Token id {min(ids)} is negative", "Token ids are 0 or more")
        text: str = self._rust.decode(ids, skip_special_tokens=False)
        return text


class _Pieces(dict[int, bytes]):
    """Id → bytes, filled as asked: a run touches few of a vocabulary's tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __missing__(self, token: int) -> bytes:
        if token < 0:
            raise OptionError(f"Token id {token} is negative", "Token ids are 0 or more")
        tokenizer = self._tokenizer
        text, spelling, added = tokenizer.id_to_token(token), tokenizer.spelling, tokenizer._added.get(token)
        if text is None:
            piece = b""
        elif spelling is None:
            piece = text.encode() if added else tokenizer._decode_whole([token]).encode()
        elif added:
            piece = spelling.of_added_token(text, special=added.special)
        else:
            piece = spelling.of_token(text)
        self[token] = piece
        return piece


def _quick_json(description: str) -> str:
    """A tokenizer.json in the form that is quickest to read: merges as text, as they were in older files.

    That saves a quarter of the time; a binary form that hands the vocabulary to the package saves no more.
    """
    whole = json.loads(description)
    merges = whole["model"].get("merges")
    if merges and not any(" " in part for merge in merges for part in merge):
        whole["model"]["merges"] = [" ".join(merge) for merge in merges]
    return json.dumps(whole, ensure_ascii=False, separators=(",", ":"))


def _check_text(text: object) -> None:
    if not isinstance(text, str):
        fix = "Decode it first, for example with .decode()" if isinstance(text, bytes) else "Pass a string"
        raise OptionError(f"The text to encode is of type {type(text).__name__}, not str", fix)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise OptionError(
            f"The text is not valid Unicode: character {error.start} is the lone surrogate {text[error.start]!r}",
            "Read the text as UTF-8; errors='replace' keeps what is readable",
        ) from error
