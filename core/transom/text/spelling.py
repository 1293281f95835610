"""Maps a single token's text to the bytes it stands for.

The `tokenizers` package decodes whole sequences. Streaming needs the bytes of each token, so this module reads the
decoder's description and applies it per token. An unknown decoder has no `Spelling`; the caller then decodes with the
package. Independent of vocabularies; imports nothing heavy.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each of the 256 bytes (Radford et al. 2019, `bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    hidden = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update({chr(0x100 + place): byte for place, byte in enumerate(hidden)})
    return alphabet


BYTE_ALPHABET = _byte_alphabet()


class Spelling(NamedTuple):  # a dataclass would add 2 ms to every start
    """The rule that maps a vocabulary's tokens to bytes."""

    byte_level: bool = False
    """Tokens are written in GPT-2's byte alphabet. Otherwise they are UTF-8 text."""
    byte_fallback: bool = False
    """A token `<0x0A>` is the byte 0x0A."""
    replacements: tuple[tuple[str, str], ...] = ()
    """Text replacements in tokens, in order, such as SentencePiece's `▁` by a space."""
    strip_start: int = 0
    """How many spaces to remove from the start of a text: the dummy prefix that encoding added."""

    def of_token(self, token: str) -> bytes:
        """The bytes of an ordinary token of the vocabulary."""
        if self.byte_level:
            try:
                return bytes([BYTE_ALPHABET[character] for character in token])
            except KeyError:  # not in the alphabet: plain text, such as a padding entry "[PAD 7]"
                return token.encode()
        if self.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return self._replaced(token).encode()

    def of_added_token(self, token: str, *, special: bool) -> bytes:
        """The bytes of an added token, which is matched as plain text: its own text."""
        return (token if special else self._replaced(token)).encode()

    def _replaced(self, text: str) -> str:
        for old, new in self.replacements:
            text = text.replace(old, new)
        return text


def spelling_of(decoder: bytes | str | None) -> Spelling | None:
    """Read a decoder's JSON description.

    Args:
        decoder: the JSON of a `tokenizers` decoder (its pickled state), or None if there is no decoder.

    Returns:
        The rule, or None if the decoder is unknown or depends on neighboring tokens in an unknown way.
    """
    if decoder is None:
        return None
    steps = _flatten(json.loads(decoder))
    kinds = [step["type"] for step in steps]
    if "ByteLevel" in kinds:
        return Spelling(byte_level=True) if set(kinds) <= {"ByteLevel", "Fuse"} else None
    replacements: list[tuple[str, str]] = []
    byte_fallback = False
    strip_start = 0
    fused = False
    for step in steps:
        kind = step["type"]
        if kind == "Replace" and "String" in step["pattern"]:
            if fused or byte_fallback:
                return None  # a replacement across tokens, or inside fallback bytes
            replacements.append((step["pattern"]["String"], step["content"]))
        elif kind == "Metaspace":
            replacements.append((step["replacement"], " "))
            strip_start = 0 if step.get("prepend_scheme") == "never" else 1
        elif kind == "ByteFallback":
            byte_fallback = True
        elif kind == "Fuse":
            fused = True
        elif kind == "Strip" and fused and step["content"] == " " and not step["stop"]:
            strip_start += step["start"]
        else:
            return None
    return Spelling(False, byte_fallback, tuple(replacements), strip_start) if steps else None


def _flatten(step: dict[str, Any]) -> list[dict[str, Any]]:
    if step["type"] == "Sequence":
        return [inner for nested in step["decoders"] for inner in _flatten(nested)]
    return [step]
