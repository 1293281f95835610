"""Reads a SentencePiece `tokenizer.model` without the `sentencepiece` package.

The file is a protocol buffer (sentencepiece_model.proto). Only a few of its fields are needed, so the wire format is
parsed directly instead of with generated code.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from transom.errors import SourceError
from transom.text.spm import BYTE, NORMAL, SentencePieceModel, longest_replacement

_UNIGRAM, _BPE = 1, 2
_KINDS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


def read_sentencepiece(path: Path) -> tuple[SentencePieceModel, dict[str, int]]:
    """Read a SentencePiece model.

    Returns:
        The model, and its ids of "bos", "eos" and "pad", if any.

    Raises:
        SourceError: the file is not a SentencePiece model, is truncated, or is of a kind other than BPE and unigram.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}", "Check the path") from error
    fix = (
        "Download it again, or write a tokenizer.json beside it with the transformers package: "
        "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
    )
    try:
        return _parse(data, path, fix)
    except (IndexError, struct.error, UnicodeDecodeError, ValueError) as error:
        raise SourceError(f"{path} is not a SentencePiece model, or it is damaged", fix, [str(error)]) from error


def _parse(data: bytes, path: Path, fix: str) -> tuple[SentencePieceModel, dict[str, int]]:
    tokens: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for field, value in _fields(data):
        if field == 1:
            piece = dict(_fields(_bytes(value)))
            tokens.append(_bytes(piece.get(1, b"")).decode())
            scores.append(struct.unpack("<f", _bytes(piece.get(2, bytes(4))))[0])
            types.append(_int(piece.get(3, NORMAL)))
        elif field == 2:
            trainer.update(_fields(_bytes(value)))
        elif field == 3:
            normalizer.update(_fields(_bytes(value)))
    if not tokens or len(set(tokens)) != len(tokens):
        raise ValueError("no pieces, or duplicate pieces")
    kind = _int(trainer.get(3, _UNIGRAM))
    if kind not in (_UNIGRAM, _BPE):
        raise SourceError(
            f"{path} is a SentencePiece model of the kind {_KINDS.get(kind, kind)}, which Transom does not support", fix
        )
    # Field numbers of TrainerSpec: 40 to 43 are the ids, signed, with these defaults
    ids = {"bos": _int(trainer.get(41, 1)), "eos": _int(trainer.get(42, 2)), "pad": _int(trainer.get(43, -1))}
    charsmap = _bytes(normalizer.get(2, b""))
    if charsmap:
        longest_replacement(charsmap)
    model = SentencePieceModel(
        tokens,
        scores,
        types,
        kind="bpe" if kind == _BPE else "unigram",
        unk_id=_int(trainer.get(40, 0)),
        byte_fallback=bool(trainer.get(35, 0)) and BYTE in types,
        add_space_prefix=bool(normalizer.get(3, 1)),
        remove_extra_spaces=bool(normalizer.get(4, 1)),
        charsmap=charsmap,
        isolate_user_defined=True,
    )
    return model, {role: token for role, token in ids.items() if 0 <= token < len(tokens)}


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers and values of one protocol buffer message."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        wire = tag & 7
        if wire == 0:
            value, place = _varint(data, place)
            yield tag >> 3, value - (1 << 64) if value >> 63 else value
            continue
        if wire == 2:
            length, place = _varint(data, place)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {place}")
        if place + length > len(data):
            raise ValueError("truncated")
        yield tag >> 3, data[place : place + length]
        place += length


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
        if shift > 63:
            raise ValueError(f"unterminated number at byte {place}")


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("expected bytes, found a number")
    return value


def _int(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise ValueError("expected a number, found bytes")
    return value
