"""The tokenizer: text to token ids and back, based on the `tokenizers` package.

The wrapped object contains everything about encoding, including the special tokens at the ends, so one file restores
it. Decoding works on bytes (`transom.text.spelling`), for streams as for whole texts, without any cleanup, so encoded
text is restored exactly.

On the warm start-up path: `load` reads one file and builds nothing in Python.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypedDict

from transom.errors import OptionError, SourceError
from transom.text.detokenizer import ByteDetokenizer, Detokenizer, WindowDetokenizer
from transom.text.spelling import Spelling, spelling_of
from transom.typed import WrongType, from_json

if TYPE_CHECKING:
    import tokenizers

_FORMAT = "transom-tokenizer"
_FORMAT_VERSION = 1
MOST_TOKENS = 1 << 24
"""Most tokens of a vocabulary; the largest known ones have a quarter of a million."""
NOT_OF_THE_PACKAGE = (KeyboardInterrupt, SystemExit, MemoryError)
"""What a call of the tokenizers package raises without having failed. All else is its error: a panic of it is a
BaseException, and not exported."""


class SpecialIds(NamedTuple):
    """The ids of tokens with a role (None if the model has none), and which of them `encode` adds."""

    bos: int | None = None
    eos: int | None = None
    unk: int | None = None
    pad: int | None = None
    add_bos: bool = False
    add_eos: bool = False


class _Header(TypedDict):
    """What `Tokenizer.header` writes."""

    format: Literal["transom-tokenizer"]
    version: int
    ids: SpecialIds
    vocabulary_size: int


class TokenPiece(NamedTuple):
    """One token of an encoded text, for display."""

    id: int
    text: str
    """The token's text; U+FFFD for a part of a character."""
    data: bytes
    special: bool


class Tokenizer:
    """Text to token ids and back.

    Args:
        rust: the encoder. Its post-processor must add the special tokens that `ids` states. Truncation and padding are
            disabled.
        ids: the ids of tokens with a role.
        vocabulary_size: one more than the largest id; None: computed, which takes a pass over the vocabulary.

    Methods may be called from several threads concurrently.
    """

    def __init__(self, rust: tokenizers.Tokenizer, ids: SpecialIds, vocabulary_size: int | None = None) -> None:
        # A tokenizer.json may contain its trainer's settings, which would silently truncate prompts.
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
            add_special: add the beginning and end tokens that the model was trained with (`add_bos`, `add_eos`). Pass
                False for a rendered chat template, which already contains them.
            parse_special: parse `<|im_end|>` and the like in the text as special tokens. With False, for untrusted
                text, they are encoded as plain text.

        Raises:
            OptionError: the text is not a `str`, or contains surrogates (from bytes that are not UTF-8).
            SourceError: the tokenizer's own rules fail on the text, such as an expression that takes too many steps.
        """
        _check_text(text)
        with self._lock:
            if self._rust.encode_special_tokens == parse_special:  # the property means "encode them as plain text"
                self._rust.encode_special_tokens = not parse_special
            return self._ids_of(text, add_special)

    def _ids_of(self, text: str, add_special: bool) -> list[int]:
        try:
            return list(self._rust.encode(text, add_special_tokens=add_special).ids)
        except NOT_OF_THE_PACKAGE:
            raise
        except BaseException as error:  # noqa: BLE001 - as stated at NOT_OF_THE_PACKAGE
            raise _fails_on("text", error) from None

    def tokens_for(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[TokenPiece]:
        """The tokens of a text, each with its own text and bytes. Raises what `encode` raises."""
        pieces = []
        for token in self.encode(text, add_special=add_special, parse_special=parse_special):
            data = self.token_bytes(token)
            pieces.append(TokenPiece(token, data.decode(errors="replace"), data, token in self.special_ids))
        return pieces

    # ---------------------------------------------------------------- decoding

    def decode(self, ids: Iterable[int], *, skip_special: bool = True, continues: bool = False) -> str:
        """Text of token ids. Bytes that are not UTF-8 become U+FFFD; an id without a token has no text.

        Args:
            ids: token ids, each 0 or more.
            skip_special: omit special tokens.
            continues: the ids continue an earlier text, so keep a leading space. Without it, the dummy space that some
                vocabularies add before a text is removed.

        Raises:
            OptionError: an id is negative.
            SourceError: the tokenizer's own rules fail on the tokens.
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
        """A new incremental detokenizer. Arguments and concatenated text are those of `decode`."""
        skip = self.special_ids if skip_special else frozenset[int]()
        if self.spelling is None:
            return WindowDetokenizer(self._decode_whole, skip)
        return ByteDetokenizer(self._pieces, skip, 0 if continues else self.spelling.strip_start)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for (the text of a special token); empty for an id without a token.

        Raises:
            OptionError: the id is negative.
        """
        return self._pieces[token]

    def token_to_id(self, token: str) -> int | None:
        """The id of a token, as spelled in the vocabulary, or None."""
        found: int | None = self._rust.token_to_id(token)
        return found

    def id_to_token(self, token: int) -> str | None:
        """The token of an id, as spelled in the vocabulary, or None."""
        found: str | None = self._rust.id_to_token(token) if 0 <= token < 1 << 32 else None
        return found

    # ---------------------------------------------------------------- facts

    @property
    def vocabulary_size(self) -> int:
        """One more than the largest id with a token. A model's logits may be wider."""
        return self._vocabulary_size

    @property
    def bos_id(self) -> int | None:
        return self._ids.bos

    @property
    def eos_id(self) -> int | None:
        """The end-of-text token. `GenerationDefaults.eos_ids` states which tokens end generation."""
        return self._ids.eos

    @property
    def unk_id(self) -> int | None:
        return self._ids.unk

    @property
    def pad_id(self) -> int | None:
        return self._ids.pad

    @property
    def beginning(self) -> list[int]:
        """What `encode` puts before a text: the id of the beginning token, or nothing. A model that was trained with
        one predicts poorly without it, and small errors grow."""
        return [self._ids.bos] if self._ids.add_bos and self._ids.bos is not None else []

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
        """Ids of control tokens, which are never text and which `decode` skips."""
        return frozenset(token for token, added in self._added.items() if added.special)

    @property
    def special_tokens(self) -> dict[str, str]:
        """Variables for chat templates: `bos_token`, `eos_token`, `unk_token`, `pad_token`, as far as they exist."""
        roles = {"bos": self._ids.bos, "eos": self._ids.eos, "unk": self._ids.unk, "pad": self._ids.pad}
        texts = {role: self.id_to_token(token) for role, token in roles.items() if token is not None}
        return {f"{role}_token": text for role, text in texts.items() if text is not None}

    @cached_property
    def spelling(self) -> Spelling | None:
        """The rule that maps tokens to bytes, or None if there is none."""
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
        """The facts that `tokenizer.json` does not contain, as JSON."""
        return json.dumps(
            {
                "format": _FORMAT,
                "version": _FORMAT_VERSION,
                "ids": self._ids._asdict(),
                "vocabulary_size": self._vocabulary_size,
            }
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the compact form that `load` reads. The file is replaced atomically.

        Raises:
            OSError: the file cannot be written.
        """
        import tempfile

        path = Path(path)
        handle, temporary = tempfile.mkstemp(prefix=path.name, suffix=".part", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(self.header().encode() + b"\n" + _compact_json(self.to_json()).encode())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Read what `save` wrote.

        Raises:
            SourceError: the file is missing, has another format or is damaged.
        """
        try:
            header, _, body = Path(path).read_bytes().partition(b"\n")
        except OSError as error:
            raise SourceError(f"{path} cannot be read: {error.strerror}", "Check the path") from error
        return cls.from_parts(header, body, path)

    @classmethod
    def from_parts(cls, header: bytes, body: bytes, path: str | os.PathLike[str]) -> Tokenizer:
        """Restore a tokenizer from the results of `header` and `to_json`.

        Args:
            path: their file, for error messages.

        Raises:
            SourceError: one of them has another format or is damaged.
        """
        from tokenizers import Tokenizer as Rust

        damaged = f"{path} is not a tokenizer that Transom wrote, or it is damaged"
        fix = "Delete it; it will be created again from the model"
        try:
            facts = from_json(_Header, header)
        except WrongType as error:
            raise SourceError(damaged, fix, [str(error)]) from error
        ids, size = facts["ids"], facts["vocabulary_size"]
        stated = [i for i in (ids.bos, ids.eos, ids.unk, ids.pad) if i is not None]
        known = all(0 <= i < size for i in stated) and 0 <= size <= MOST_TOKENS
        if facts["version"] != _FORMAT_VERSION or not known:
            raise SourceError(damaged, fix)
        try:
            rust = Rust.from_buffer(body)
        except NOT_OF_THE_PACKAGE:
            raise
        except BaseException as error:
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
        try:
            return str(self._rust.decode(ids, skip_special_tokens=False))
        except NOT_OF_THE_PACKAGE:
            raise
        except BaseException as error:  # noqa: BLE001 - as stated at NOT_OF_THE_PACKAGE
            raise _fails_on("answer", error) from None


class _Pieces(dict[int, bytes]):
    """Bytes by id, computed on demand: a run uses few of a vocabulary's tokens."""

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


def _compact_json(description: str) -> str:
    """A tokenizer.json in the form that loads fastest: merges as text, as in older files.

    This saves a quarter of the time; a binary form of the vocabulary would not save more.
    """
    whole = json.loads(description)
    merges = whole["model"].get("merges")
    if merges and not any(" " in part for merge in merges for part in merge):
        whole["model"]["merges"] = [" ".join(merge) for merge in merges]
    return json.dumps(whole, ensure_ascii=False, separators=(",", ":"))


def _fails_on(what: str, error: BaseException) -> SourceError:
    return SourceError(
        f"The model's tokenizer fails on this {what}: {str(error)[:200] or type(error).__name__}",
        "Get the model's tokenizer files again, from their original source",
    )


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
