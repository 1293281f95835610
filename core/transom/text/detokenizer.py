"""Incremental detokenizers: text from a stream of token ids, without splitting characters.

A token may end in the middle of a UTF-8 character. `ByteDetokenizer` works on each token's bytes and holds back only
incomplete characters, so the cost per token does not grow with the text. `WindowDetokenizer` is for decoders whose
tokens do not map to bytes (such as WordPiece): it decodes a short window twice and emits the difference.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Protocol


class Detokenizer(Protocol):
    """Converts ids to text one at a time. The concatenated pieces equal `Tokenizer.decode` of all ids."""

    def push(self, token: int) -> str:
        """The text that is final after this token; empty while a character is incomplete."""

    def finish(self) -> str:
        """The text that was held back, with U+FFFD for an incomplete character. Resets the detokenizer."""


class ByteDetokenizer:
    """Detokenizer over the bytes of each token.

    Args:
        pieces: bytes of every id that may be pushed.
        skip: ids without text.
        strip_start: how many spaces to remove from the start of the text.
    """

    def __init__(self, pieces: Mapping[int, bytes], skip: Container[int] = (), strip_start: int = 0) -> None:
        self._pieces = pieces
        self._skip = skip
        self._strip_start = strip_start
        self._strip = strip_start
        # Like decoding the whole text, the incremental decoder replaces maximal invalid parts, as the Unicode standard
        # recommends (chapter 3.9, U+FFFD substitution).
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        if token in self._skip:
            return ""
        piece = self._pieces[token]
        if self._strip:
            piece = self._stripped(piece)
        return self._decoder.decode(piece)

    def finish(self) -> str:
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        self._strip = self._strip_start
        return rest

    def _stripped(self, piece: bytes) -> bytes:
        while self._strip and piece:
            if not piece.startswith(b" "):
                self._strip = 0
                break
            piece = piece[1:]
            self._strip -= 1
        return piece


class WindowDetokenizer:
    """Detokenizer over a decoding function, for vocabularies without a `Spelling`.

    Args:
        decode: converts ids to text. The text of a sequence must begin with the text of each of its prefixes, except
            for an incomplete character at the end of the latter.
        skip: ids without text.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], skip: Container[int] = ()) -> None:
        self._decode = decode
        self._skip = skip
        self._window: list[int] = []
        self._emitted = 0  # how many ids of the window have been emitted; they are kept as context

    def push(self, token: int) -> str:
        if token in self._skip:
            return ""
        self._window.append(token)
        text = self._decode(self._window)
        if text.endswith("\ufffd"):
            return ""
        return self._emit(text)

    def finish(self) -> str:
        rest = self._emit(self._decode(self._window)) if self._window else ""
        self._window, self._emitted = [], 0
        return rest

    def _emit(self, text: str) -> str:
        piece = text[len(self._decode(self._window[: self._emitted])) :] if self._emitted else text
        if piece:
            self._window = self._window[self._emitted :]
            self._emitted = len(self._window)
        return piece
