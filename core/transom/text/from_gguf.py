"""Builds the tokenizer and chat template of a GGUF file from its metadata.

The input is a plain mapping of metadata keys to Python values, so no file and no `gguf` package is needed. The keys are
those of the GGUF specification (`tokenizer.ggml.*`). They are interpreted as in llama.cpp, except where the model's own
tokenizer is known to differ.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from transom.errors import SourceError, nearest
from transom.text import spm
from transom.text.chat_template import ChatTemplate
from transom.text.defaults import END_MARKERS
from transom.text.pre_tokenizers import pre_tokenizer
from transom.text.tokenizer import SpecialIds, Tokenizer

if TYPE_CHECKING:
    import tokenizers

T = TypeVar("T")
_NO_ID = 0xFFFFFFFF
_REPAIR = "Download the file again, or convert the model again with a current llama.cpp"


def tokenizer_from_gguf(metadata: Mapping[str, Any], *, pre: str | None = None) -> Tokenizer:
    """Build the tokenizer that a GGUF file describes.

    Args:
        metadata: metadata keys and their values: strings, numbers, lists. Only tokenizer keys and
            `general.architecture` are used.
        pre: the pre-tokenizer's name, for files in which it is missing or wrong.

    Raises:
        SourceError: the vocabulary is missing, the kind of tokenizer or pre-tokenizer is unknown, or the metadata is
            damaged.
    """
    model = _one(metadata, "tokenizer.ggml.model", str, "")
    if not model:
        raise SourceError(
            "The GGUF file has no tokenizer (tokenizer.ggml.model is missing)",
            "Use a file that was converted with its vocabulary",
        )
    builder = _BUILDERS.get(model)
    if builder is None:
        raise SourceError(
            f'The GGUF file has a tokenizer of the kind "{model}" (tokenizer.ggml.model), which Transom cannot build',
            f"Load the Hugging Face directory of the model instead. {nearest(model, _BUILDERS)}",
        )
    tokens = _tokens(metadata)
    types = _numbers(metadata, "token_type", len(tokens), int) or [spm.NORMAL] * len(tokens)
    return builder(metadata, tokens, types, pre)


def chat_template_from_gguf(metadata: Mapping[str, Any], tokenizer: Tokenizer | None) -> ChatTemplate | None:
    """The chat template, including named ones (`tokenizer.chat_template.<name>`), or None if the file has none.

    The template is parsed, and a `ChatTemplateError` raised, when it is first rendered.
    """
    key = "tokenizer.chat_template"
    named = [name for name in metadata if name.startswith(f"{key}.")]
    templates = {name[len(key) + 1 :]: _one(metadata, name, str, "") for name in named}
    templates["default"] = _one(metadata, key, str, "") or templates.get("default", "")
    templates = {name: text for name, text in templates.items() if text}
    return ChatTemplate(templates, tokenizer.special_tokens if tokenizer else {}) if templates else None


# -------------------------------------------------------------------- kinds


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], types: list[int], pre: str | None) -> Tokenizer:
    from tokenizers import Tokenizer as Rust
    from tokenizers import decoders, models, normalizers

    name = pre or _one(metadata, "tokenizer.ggml.pre", str, "")
    if not name:
        raise SourceError(
            "The GGUF file does not name its pre-tokenizer (tokenizer.ggml.pre), so text cannot be split as in the "
            "model's training",
            "Convert the model again with a current llama.cpp, or use its Hugging Face directory",
        )
    cut = pre_tokenizer(name)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = _merges(metadata, vocabulary)
    if merges is None:
        raise SourceError("The GGUF file has a BPE vocabulary without merges (tokenizer.ggml.merges)", _REPAIR)
    rust = Rust(models.BPE(vocabulary, merges, ignore_merges=cut.ignore_merges))
    if cut.nfc:
        rust.normalizer = normalizers.NFC()
    rust.pre_tokenizer = cut.build()
    rust.decoder = decoders.ByteLevel()
    return _finish(rust, metadata, tokens, types, _ids(metadata, tokens, SpecialIds(add_bos=cut.add_bos)))


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], types: list[int], pre: str | None) -> Tokenizer:
    ids = _ids(metadata, tokens, SpecialIds(bos=1, eos=2, unk=0, add_bos=True))
    model = spm.SentencePieceModel(
        tokens,
        _numbers(metadata, "scores", len(tokens), float) or [0.0] * len(tokens),
        types,
        unk_id=ids.unk,
        add_space_prefix=_flag(metadata, "add_space_prefix", True),
    )
    return _finish(spm.build(model), metadata, tokens, types, ids)


def _gemma4(metadata: Mapping[str, Any], tokens: list[str], types: list[int], pre: str | None) -> Tokenizer:
    """BPE over raw text with `▁` for spaces, like SentencePiece, but with explicit merges."""
    ids = _ids(metadata, tokens, SpecialIds(add_bos=True))
    merges = _merges(metadata, {token: index for index, token in enumerate(tokens)})
    if merges is None:
        raise SourceError("The GGUF file has a BPE vocabulary without merges (tokenizer.ggml.merges)", _REPAIR)
    scores = [0.0] * len(tokens)
    model = spm.SentencePieceModel(tokens, scores, types, unk_id=ids.unk, add_space_prefix=False, merges=merges)
    return _finish(spm.build(model), metadata, tokens, types, ids)


def _unigram(metadata: Mapping[str, Any], tokens: list[str], types: list[int], pre: str | None) -> Tokenizer:
    ids = _ids(metadata, tokens, SpecialIds(eos=1, unk=2, pad=0, add_eos=True))
    scores = _numbers(metadata, "scores", len(tokens), float)
    if scores is None:
        raise SourceError("The GGUF file has a unigram vocabulary without scores (tokenizer.ggml.scores)", _REPAIR)
    charsmap = bytes(value & 0xFF for value in _many(metadata, "precompiled_charsmap", int) or ())
    if charsmap:
        try:
            spm.longest_replacement(charsmap)
        except ValueError as error:
            raise SourceError(f"The GGUF file is damaged: tokenizer.ggml.{error}", _REPAIR) from error
    model = spm.SentencePieceModel(
        tokens,
        scores,
        types,
        kind="unigram",
        unk_id=ids.unk,
        add_space_prefix=_flag(metadata, "add_space_prefix", True),
        remove_extra_spaces=_flag(metadata, "remove_extra_whitespaces", False),
        charsmap=charsmap,
    )
    return _finish(spm.build(model), metadata, tokens, types, ids)


_Builder = Callable[[Mapping[str, Any], list[str], list[int], "str | None"], Tokenizer]
_BUILDERS: dict[str, _Builder] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece,
    "gemma4": _gemma4,
    "t5": _unigram,
}

# -------------------------------------------------------------------- parts


def _finish(
    rust: tokenizers.Tokenizer, metadata: Mapping[str, Any], tokens: list[str], types: list[int], ids: SpecialIds
) -> Tokenizer:
    """Add the added tokens and the special tokens at the ends, for all kinds of tokenizers."""
    from tokenizers import AddedToken

    # In Phi-3's tokenizer.json, control tokens absorb the following white space; GGUF cannot express this
    phi3 = metadata.get("general.architecture") == "phi3" and metadata["tokenizer.ggml.model"] == "llama"
    added = []
    for token, kind in zip(tokens, types, strict=True):
        # Some converters mark end-of-turn tokens as user-defined, which would make them text that ends no turn
        special = kind in (spm.CONTROL, spm.UNKNOWN) or (kind == spm.USER_DEFINED and token in END_MARKERS)
        if special or kind == spm.USER_DEFINED:
            swallow = phi3 and special and token not in ("<unk>", "<s>", "<|endoftext|>")
            added.append(AddedToken(token, normalized=False, special=special, rstrip=swallow))
    rust.add_tokens(added)
    set_ends(rust, ids)
    return Tokenizer(rust, ids, len(tokens))


def set_ends(rust: tokenizers.Tokenizer, ids: SpecialIds) -> None:
    """Make the encoder add the beginning and end tokens that `ids` specifies."""
    from tokenizers import processors

    ends = {}
    first = last = ""
    if ids.add_bos and ids.bos is not None:
        ends[token := rust.id_to_token(ids.bos)] = ids.bos
        first = f"{token}:0 "
    if ids.add_eos and ids.eos is not None:
        ends[token := rust.id_to_token(ids.eos)] = ids.eos
        last = f" {token}:0"
    if ends:
        rust.post_processor = processors.TemplateProcessing(
            single=f"{first}$A:0{last}", pair=f"{first}$A:0{last} $B:1", special_tokens=list(ends.items())
        )


def _tokens(metadata: Mapping[str, Any]) -> list[str]:
    tokens = _many(metadata, "tokens", str)
    if not tokens:
        raise SourceError("The GGUF file has no vocabulary (tokenizer.ggml.tokens)", _REPAIR)
    # llama.cpp's name for empty tokens; names must be unique
    tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)]
    if len(set(tokens)) != len(tokens):
        seen: dict[str, int] = {}
        for index, token in enumerate(tokens):
            if token in seen:
                raise SourceError(
                    f"The GGUF file's vocabulary is damaged: ids {seen[token]} and {index} are both {token!r}", _REPAIR
                )
            seen[token] = index
    return tokens


def _one(metadata: Mapping[str, Any], key: str, kind: type[T], default: T) -> T:
    """A setting of this type, or the default where there is none."""
    value = metadata.get(key)
    if value is None:
        return default
    if not isinstance(value, kind):
        raise _wrong(key, value, "a text" if kind is str else "true or false")
    return value


def _many(metadata: Mapping[str, Any], key: str, kind: type[T]) -> list[T] | None:
    """A list of texts, whole numbers or finite numbers, or None where there is none."""
    key = f"tokenizer.ggml.{key}"
    values = metadata.get(key)
    if values is None:
        return None
    wanted = "a list of " + ("texts" if kind is str else "whole numbers" if kind is int else "finite numbers")
    if hasattr(values, "tolist"):
        values = values.tolist()  # of NumPy
    if not isinstance(values, list | tuple):
        raise _wrong(key, values, wanted)
    for value in values:
        if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
            raise _wrong(key, value, wanted)
    return list(values)


def _wrong(key: str, value: object, wanted: str) -> SourceError:
    text = repr(value)
    return SourceError(
        f"{key} of the GGUF file is {text if len(text) < 80 else text[:79] + '…'}, not {wanted}", _REPAIR
    )


def _numbers(metadata: Mapping[str, Any], key: str, count: int, kind: type[T]) -> list[T] | None:
    values = _many(metadata, key, kind)
    if not values:
        return None
    if len(values) < count:
        raise SourceError(
            f"The GGUF file's vocabulary is damaged: {count} tokens but {len(values)} values in tokenizer.ggml.{key}",
            _REPAIR,
        )
    return values[:count]


def _merges(metadata: Mapping[str, Any], vocabulary: Mapping[str, int]) -> list[tuple[str, str]] | None:
    lines = metadata.get("tokenizer.ggml.merges")
    if not lines:
        return None
    merges = []
    for line in lines if isinstance(lines, list | tuple) else [lines]:
        if not isinstance(line, str):
            raise SourceError(
                f"The GGUF file's vocabulary is damaged: the merge {line!r} (tokenizer.ggml.merges) is not text",
                _REPAIR,
            )
        cut = line.find(" ", 1)  # a part may begin with a space
        left, right = line[:cut], line[cut + 1 :]
        if cut < 0 or left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise SourceError(
                f"The GGUF file's vocabulary is damaged: the merge {line!r} (tokenizer.ggml.merges) is not of tokens",
                _REPAIR,
            )
        merges.append((left, right))
    return merges


def _flag(metadata: Mapping[str, Any], key: str, default: bool) -> bool:
    return _one(metadata, f"tokenizer.ggml.{key}", bool, default)


def _ids(metadata: Mapping[str, Any], tokens: list[str], default: SpecialIds) -> SpecialIds:
    def role(key: str, fallback: int | None) -> int | None:
        value = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if value is None:
            return fallback if fallback is not None and fallback < len(tokens) else None
        try:
            value = operator.index(value)
        except TypeError:
            raise SourceError(
                f"The GGUF file's vocabulary is damaged: tokenizer.ggml.{key}_token_id is {str(value)[:40]!r}, "
                "not a token id",
                _REPAIR,
            ) from None
        if value in (_NO_ID, -1):  # -1, possibly as an unsigned number: none
            return None
        if not 0 <= value < len(tokens):
            if key == "padding":  # some converters write one past the vocabulary; padding is not used here
                return None
            raise SourceError(
                f"The GGUF file's vocabulary is damaged: tokenizer.ggml.{key}_token_id is {value}, "
                f"but there are {len(tokens)} tokens",
                _REPAIR,
            )
        return value

    bos, eos = role("bos", default.bos), role("eos", default.eos)
    return SpecialIds(
        bos=bos,
        eos=eos,
        unk=role("unknown", default.unk),
        pad=role("padding", default.pad),
        add_bos=_flag(metadata, "add_bos_token", default.add_bos) and bos is not None,
        add_eos=_flag(metadata, "add_eos_token", default.add_eos) and eos is not None,
    )
