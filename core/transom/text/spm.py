"""SentencePiece vocabularies as `tokenizers` objects: BPE by score, and unigram, both with byte fallback.

A SentencePiece BPE model has scores instead of merges (Kudo and Richardson 2018). Merging the pair whose joint token
scores best is the same as applying merges in the order of their results' scores, so merges are derived here.
Used for both GGUF files and `tokenizer.model` files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import tokenizers
    from tokenizers import decoders, normalizers, pre_tokenizers

SPACE = "▁"
MAX_REPLACEMENT = 1 << 10
"""Characters in place of one. The most that Unicode's own rules make are 18."""
_NEVER = -1e6

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Token types: the same numbers in sentencepiece_model.proto and in GGUF (`tokenizer.ggml.token_type`)."""


@dataclass(frozen=True)
class SentencePieceModel:
    """A SentencePiece model, from any file format."""

    tokens: Sequence[str]
    """Token texts, indexed by id. Distinct."""
    scores: Sequence[float]
    types: Sequence[int]
    kind: Literal["bpe", "unigram"] = "bpe"
    unk_id: int | None = 0
    byte_fallback: bool = True
    add_space_prefix: bool = True
    remove_extra_spaces: bool = False
    charsmap: bytes = b""
    """Precompiled normalization rules (a Darts trie), as stored by SentencePiece."""
    merges: Sequence[tuple[str, str]] | None = None
    """Explicit merges, if the file has them; otherwise they are derived from the scores."""
    isolate_user_defined: bool = False
    """Split user-defined tokens from the normalized text, as SentencePiece does. Otherwise the caller adds them as
    tokens that are split from the text before normalization, as llama.cpp does."""


def longest_replacement(charsmap: bytes) -> int:
    """The most characters that precompiled rules put in place of one.

    The package reads only the size of the trie, and ends the process if that is not true.

    Raises:
        ValueError: the rules are damaged, or replace a character by more than `MAX_REPLACEMENT`.
    """
    size = int.from_bytes(charsmap[:4], "little")
    if size < 4 or size % 4 or size > len(charsmap) - 4:
        raise ValueError(f"precompiled_charsmap states a trie of {size} bytes and has {max(len(charsmap) - 4, 0)}")
    try:
        longest = max(map(len, charsmap[4 + size :].decode().split("\0")))
    except UnicodeDecodeError as error:
        raise ValueError("precompiled_charsmap replaces by something that is not UTF-8") from error
    if longest > MAX_REPLACEMENT:
        raise ValueError(f"precompiled_charsmap replaces a character by {longest}")
    return longest


def build(model: SentencePieceModel) -> tokenizers.Tokenizer:
    """The encoder and decoder, without its added tokens and post-processor."""
    from tokenizers import Tokenizer, models

    vocabulary = {token: index for index, token in enumerate(model.tokens)}
    unk = None if model.unk_id is None else model.tokens[model.unk_id]
    # Byte tokens can only be used if all 256 exist
    byte_fallback = model.byte_fallback and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    cut = _cut(model)
    if model.kind == "unigram":
        # Plain text never becomes control or byte tokens; the package has no other way to express this
        pieces = [
            (token, float(score) if kind in (NORMAL, USER_DEFINED) else _NEVER)
            for token, score, kind in zip(model.tokens, model.scores, model.types, strict=True)
        ]
        inner: models.Model = models.Unigram(pieces, model.unk_id, byte_fallback)
    else:
        merges = list(model.merges) if model.merges is not None else merges_by_score(model)
        inner = models.BPE(
            vocabulary,
            merges,
            unk_token=unk,
            fuse_unk=True,
            byte_fallback=byte_fallback,
            ignore_merges=cut is not None,
        )
    rust = Tokenizer(inner)
    if cut is not None:
        rust.pre_tokenizer = cut
    rust.normalizer = _normalizer(model)
    rust.decoder = _decoder(model, byte_fallback)
    return rust


def merges_by_score(model: SentencePieceModel) -> list[tuple[str, str]]:
    """Merges in SentencePiece's order: best score first, then smaller id, then longer left part.

    Only normal tokens take part: plain text never becomes control tokens, and user-defined tokens are matched as a
    whole before merging. If a token can result from two pairs, SentencePiece merges the leftmost in the text, which a
    fixed order cannot express; preferring the longer left part is correct for repeated characters.
    """
    normal = {
        token: (-float(score), index)
        for index, (token, score, kind) in enumerate(zip(model.tokens, model.scores, model.types, strict=True))
        if kind == NORMAL
    }
    ranked = [
        (*rank, -cut, token[:cut], token[cut:])
        for token, rank in normal.items()
        for cut in range(1, len(token))
        if token[:cut] in normal and token[cut:] in normal
    ]
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def _normalizer(model: SentencePieceModel) -> normalizers.Normalizer:
    from tokenizers import Regex, normalizers

    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.remove_extra_spaces:
        # Only spaces: SentencePiece does not change newlines
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if model.add_space_prefix:
        # Also before a space and after a special token, as in SentencePiece and llama.cpp
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    return normalizers.Sequence(steps)


def _decoder(model: SentencePieceModel, byte_fallback: bool) -> decoders.Decoder:
    from tokenizers import decoders

    steps: list[decoders.Decoder] = [decoders.Replace(SPACE, " ")]
    if byte_fallback:
        steps.append(decoders.ByteFallback())
    steps.append(decoders.Fuse())
    if model.add_space_prefix:
        steps.append(decoders.Strip(content=" ", left=1, right=0))
    return decoders.Sequence(steps)


def _cut(model: SentencePieceModel) -> pre_tokenizers.PreTokenizer | None:
    """A pre-tokenizer that makes every user-defined token in the text a word, longest first.

    Such words become one token, so a control token that is spelled out in the text must not be a word: the last
    alternatives split it after its first character.
    """
    from tokenizers import Regex, pre_tokenizers

    defined = [token for token, kind in zip(model.tokens, model.types, strict=True) if kind == USER_DEFINED]
    if not model.isolate_user_defined or not defined:
        return None
    alternatives = [re.escape(token) for token in sorted(defined, key=len, reverse=True)]
    for token, kind in zip(model.tokens, model.types, strict=True):
        if kind in (CONTROL, UNKNOWN) and len(token) > 1:
            alternatives.append(f"{re.escape(token[0])}(?={re.escape(token[1:])})")
    return pre_tokenizers.Split(Regex("|".join(alternatives)), "isolated")
