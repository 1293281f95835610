"""Builds the tokenizer, chat template and generation defaults of a Hugging Face model directory.

The `tokenizers` package reads `tokenizer.json`; `tokenizer_config.json` and older companion files state the roles of
tokens. A directory with only a SentencePiece `tokenizer.model` works as well.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Required, TypedDict, TypeVar

from transom.errors import SourceError, TransomError
from transom.text import spm
from transom.text.chat_template import ChatTemplate
from transom.text.defaults import GenerationDefaults, defaults_from_hf
from transom.text.from_gguf import set_ends
from transom.text.sentencepiece_model import read_sentencepiece
from transom.text.spm import longest_replacement
from transom.text.tokenizer import NOT_OF_THE_PACKAGE, SpecialIds, Tokenizer
from transom.typed import WrongType, typed

if TYPE_CHECKING:
    import tokenizers

T = TypeVar("T")
_LONGEST = 1 << 16
"""How many times as long the rules of a tokenizer may make a text. Those of real models stay below a few thousand, even
if every character were the worst one for every rule."""
_MOST_STEPS = 256
"""How many rules a tokenizer may have one after the other. Those of real models have fewer than twenty."""
_GROWTH = {
    **dict.fromkeys(("NFKC", "NFKD"), 18.0),  # the most characters that Unicode makes of one
    "NFD": 4.0,
    "NFC": 3.0,
    "Lowercase": 2.0,
    "BertNormalizer": 24.0,  # spaces around it, NFD and lower case
    "ByteLevel": 5.0,  # each byte of a character becomes a character, and a space is put before it
    "None": 24.0,  # without a type
    "Metaspace": 2.0,  # a space is put before each part, which can be one character
    **dict.fromkeys(("BPEDecoder", "CTC", "WordPiece"), 2.0),  # spaces at the ends of words, which can be anywhere
}
"""How many times as long some rules make a text at most. Those of other names do not lengthen it, or by what they
contain."""
_ROLES = ("bos", "eos", "unk", "pad")
_CONVERT = (
    "Write a tokenizer.json with the transformers package: "
    "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
)


class _Token(TypedDict, total=False):
    """A token with its flags."""

    content: Required[str]
    special: bool
    normalized: bool
    lstrip: bool
    rstrip: bool
    single_word: bool


class _Roles(TypedDict, total=False):
    """What is read of special_tokens_map.json and tokenizer_config.json; both have more."""

    bos_token: str | _Token | None
    eos_token: str | _Token | None
    unk_token: str | _Token | None
    pad_token: str | _Token | None


class _NamedTemplate(TypedDict):
    name: str
    template: str


class _Templates(TypedDict, total=False):
    """What is read of chat_template.json and tokenizer_config.json."""

    chat_template: str | list[_NamedTemplate] | dict[str, str] | None


class _TokenizerConfig(_Roles, _Templates, total=False):
    add_bos_token: bool | None
    add_eos_token: bool | None
    added_tokens_decoder: dict[str, _Token] | None


def tokenizer_from_hf(folder: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face model directory.

    Raises:
        SourceError: the directory has no tokenizer, or a file is missing, not JSON or damaged.
    """
    config = read_typed(folder / "tokenizer_config.json", _TokenizerConfig)
    if (folder / "tokenizer.json").exists():
        return _from_tokenizer_json(folder, config)
    if (folder / "tokenizer.model").exists():
        return _from_sentencepiece(folder, config)
    found = [name for name in ("vocab.json", "merges.txt", "tekken.json", "tiktoken.model") if (folder / name).exists()]
    if found:
        raise SourceError(f"{folder} has no tokenizer.json, only {' and '.join(found)}", _CONVERT)
    raise SourceError(
        f"{folder} has no tokenizer (tokenizer.json or tokenizer.model)",
        "Download the model's tokenizer files into the directory",
    )


def chat_template_from_hf(folder: Path, tokenizer: Tokenizer | None) -> ChatTemplate | None:
    """The chat template of a model directory, or None if it has none.

    Searched in the order of transformers: `chat_template.jinja` and `additional_chat_templates/*.jinja`, then
    `chat_template.json`, then `chat_template` in `tokenizer_config.json`, which may be a list of named templates.

    Raises:
        SourceError: a file is not JSON or not UTF-8.
    """
    templates = {"default": folder / "chat_template.jinja"}
    templates.update({path.stem: path for path in sorted(folder.glob("additional_chat_templates/*.jinja"))})
    sources = {name: _read(path) for name, path in templates.items() if path.exists()}
    if not sources:
        files = ("chat_template.json", "tokenizer_config.json")
        found = [read_typed(folder / file, _Templates).get("chat_template") for file in files]
        stated = found[0] or found[1]
        if isinstance(stated, str):
            sources = {"default": stated}
        elif isinstance(stated, list):
            sources = {entry["name"]: entry["template"] for entry in stated}
        elif stated:
            sources = dict(stated)
    if not sources:
        return None
    variables: dict[str, Any] = dict(tokenizer.special_tokens) if tokenizer else {}
    # Templates may also use tokens that are specific to the model, such as `image_token`
    config = {**read_json(folder / "special_tokens_map.json", {}), **read_json(folder / "tokenizer_config.json", {})}
    for key, value in config.items():
        text = _content(value)
        if key.endswith("_token") and text is not None:
            variables.setdefault(key, text)
    return ChatTemplate(sources, variables)


def generation_from_hf(folder: Path, tokenizer: Tokenizer | None) -> GenerationDefaults:
    """The generation defaults of a model directory.

    Raises:
        SourceError: a file is not JSON, or a value is invalid.
    """
    generation = read_json(folder / "generation_config.json", {})
    return defaults_from_hf(generation, read_json(folder / "config.json", {}), tokenizer)


def read_json(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """Read a JSON file that contains an object.

    Args:
        path: the file.
        default: returned if the file does not exist; None: a missing file is an error.

    Raises:
        SourceError: the file is missing and there is no default, or it is unreadable or not a JSON object.
    """
    if default is not None and not path.exists():
        return default
    try:
        value = json.loads(_read(path), parse_int=_whole)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not valid JSON: {error}", "Download the file again") from error
    if not isinstance(value, dict):
        raise SourceError(f"{path} does not contain a JSON object", "Download the file again")
    return value


def read_typed(path: Path, kind: type[T]) -> T:
    """The content of a JSON file as a type (`transom.typed`); that of an empty object if there is no such file.

    Raises:
        SourceError: as `read_json`, or a value is of another type; the message names it.
    """
    whole = read_json(path, {})
    try:
        return typed(kind, whole)
    except WrongType as error:
        raise SourceError(error.sentence(str(path)), "Download the file again, or correct the value") from error


def _whole(digits: str) -> int | float:
    """A whole number. One that no float holds is infinite, as 1e400 is: who reads it says which value is wrong."""
    return int(digits) if len(digits) <= 300 else math.copysign(math.inf, -1 if digits.startswith("-") else 1)


# -------------------------------------------------------------------- kinds


def _from_tokenizer_json(folder: Path, config: _TokenizerConfig) -> Tokenizer:
    from tokenizers import Tokenizer as Rust

    path = folder / "tokenizer.json"
    text = _read(path)
    _require_short_rules(path, text)
    names = {**_role_names(read_typed(folder / "special_tokens_map.json", _Roles)), **_role_names(config)}
    try:
        rust = Rust.from_str(text)
        _add_tokens(rust, folder, config, names)
    except (*NOT_OF_THE_PACKAGE, TransomError):
        raise
    except BaseException as error:
        if "{" not in text[:1000]:
            detail = "it is not JSON; a Git LFS pointer file looks like this" if "git-lfs" in text else "it is not JSON"
        else:
            detail = str(error)[:1000]
        raise SourceError(
            f"{path} cannot be read: {detail}", "Download the file again, or update the tokenizers package"
        ) from error
    roles = {role: rust.token_to_id(name) for role, name in names.items()}
    if roles.get("unk") is None and (unk := getattr(rust.model, "unk_token", None)):
        roles["unk"] = rust.token_to_id(unk)
    try:
        before, after = _ends(rust.post_processor)
    except (KeyError, TypeError, IndexError) as error:
        raise SourceError(
            f"The post-processor in {path} adds the special token {error}, which it does not define",
            "Download the file again",
        ) from error
    model_config = read_json(folder / "config.json", {})
    for role in ("bos", "eos", "pad"):  # the tokenizer's files may omit what config.json states
        if role not in names and isinstance(token := model_config.get(f"{role}_token_id"), int):
            roles.setdefault(role, token if rust.id_to_token(token) is not None else None)
    bos, eos = roles.get("bos"), roles.get("eos")
    # add_bos_token and add_eos_token of the configuration are ignored: the post-processor decides, as in transformers 5
    ids = SpecialIds(bos, eos, roles.get("unk"), roles.get("pad"), bos in before, eos in after)
    return Tokenizer(rust, ids)


def _from_sentencepiece(folder: Path, config: _TokenizerConfig) -> Tokenizer:
    model, own = read_sentencepiece(folder / "tokenizer.model")
    rust = spm.build(model)
    from tokenizers import AddedToken

    control = [
        AddedToken(token, normalized=False, special=True)
        for token, kind in zip(model.tokens, model.types, strict=True)
        if kind in (spm.CONTROL, spm.UNKNOWN)
    ]
    rust.add_tokens(control)
    names = {**_role_names(read_typed(folder / "special_tokens_map.json", _Roles)), **_role_names(config)}
    _add_tokens(rust, folder, config, names)
    roles: dict[str, int | None] = {**own, "unk": model.unk_id}
    roles.update({role: rust.token_to_id(name) for role, name in names.items()})
    bos, eos = roles.get("bos"), roles.get("eos")
    ids = SpecialIds(
        bos,
        eos,
        roles.get("unk"),
        roles.get("pad"),
        # LlamaTokenizer and its successors add the beginning token by default
        bool(_stated(config, "add_bos_token", True)) and bos is not None,
        bool(_stated(config, "add_eos_token", False)) and eos is not None,
    )
    set_ends(rust, ids)
    return Tokenizer(rust, ids)


# -------------------------------------------------------------------- parts


def _require_short_rules(path: Path, text: str) -> None:
    """Refuse rules that lengthen a text so often that encoding or decoding a short one never ends, and too many rules.

    Raises:
        SourceError: the rules may make a text more than `_LONGEST` times as long, are more than `_MOST_STEPS`, or one
            is damaged in a way that would end the process.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return  # the package says what is wrong
    if not isinstance(data, dict):
        return
    for parts in (("normalizer", "pre_tokenizer"), ("decoder",), ("post_processor",)):
        steps, factor, number = [data.get(part) for part in parts], 1.0, 0
        while steps:
            step = steps.pop()
            if not isinstance(step, dict):
                continue
            for name in ("normalizers", "pretokenizers", "decoders", "processors"):
                if isinstance(inner := step.get(name), list):
                    steps.extend(inner)
            number += 1
            if number > _MOST_STEPS:
                raise SourceError(
                    f"There are more than {_MOST_STEPS} steps in the {' and '.join(parts)} of {path}",
                    "Do not trust this file; get the tokenizer from the model's original source",
                )
            try:
                factor *= _lengthens(step, parts)
            except ValueError as error:
                raise SourceError(f"The {parts[0]} in {path} is damaged: {error}", "Download the file again") from error
            if factor > _LONGEST:
                raise SourceError(
                    f"The {' and '.join(parts)} in {path} can make a text {_LONGEST} times longer, so it would not end",
                    "Do not trust this file; get the tokenizer from the model's original source",
                )


def _lengthens(step: Mapping[str, Any], parts: tuple[str, ...]) -> float:
    """How many times as long one rule may make a text.

    The package knows a rule without a type by what it contains.

    Raises:
        ValueError: it is damaged in a way that would end the process.
    """
    if parts == ("post_processor",):
        single, tokens = step.get("single"), step.get("special_tokens")
        ids = [len(token.get("ids") or ()) for token in tokens.values()] if isinstance(tokens, dict) else []
        return float(len(single) * max(ids, default=1)) if isinstance(single, list) else 1.0
    if isinstance(charsmap := step.get("precompiled_charsmap"), str):
        return float(longest_replacement(base64.b64decode(charsmap, validate=True)))
    if isinstance(before := step.get("prepend"), str):
        return 1.0 + len(before)
    if "pattern" not in step or "content" not in step:
        kind = str(step.get("type"))
        return 1.0 if kind == "ByteLevel" and parts == ("decoder",) else _GROWTH.get(kind, 1.0)
    pattern, content = step.get("pattern"), len(str(step["content"]))
    old = pattern.get("String") if isinstance(pattern, dict) else None
    if isinstance(old, str) and old:
        return max(1.0, content / len(old))
    return content + 1.0  # an expression may match nothing, between any two characters


def _add_tokens(rust: tokenizers.Tokenizer, folder: Path, config: _TokenizerConfig, names: Mapping[str, str]) -> None:
    """Add tokens that are only in the companion files, and mark tokens as special that are special only there."""
    from tokenizers import AddedToken

    stated: dict[int, tuple[_Token, str]] = {}
    file = "added_tokens.json"
    for content, number in read_typed(folder / file, dict[str, int]).items():
        stated[number] = {"content": content, "normalized": False, "special": content in names.values()}, file
    file = "tokenizer_config.json"
    for digits, entry in (config.get("added_tokens_decoder") or {}).items():
        if not digits.isascii() or not digits.isdigit() or len(digits) > 18:
            raise SourceError(
                f"added_tokens_decoder in {folder / file} has the token id {digits[:80]!r}", "Download the file again"
            )
        stated[int(digits)] = entry, file
    known = rust.get_added_tokens_decoder()
    for stated_id, (entry, file) in sorted(stated.items(), key=lambda item: item[0]):
        content, special = entry["content"], entry.get("special", False)
        if stated_id in known and known[stated_id].special >= special:
            continue
        flags = {key: bool(entry.get(key, False)) for key in ("lstrip", "rstrip", "single_word")}
        normalized = entry.get("normalized", not special)
        rust.add_tokens([AddedToken(content, normalized=normalized, special=special, **flags)])
        if rust.token_to_id(content) != stated_id:
            raise SourceError(
                f"The tokenizer in {folder} is inconsistent: {content!r} has the id {stated_id} in {file} and "
                f"{rust.token_to_id(content)} in tokenizer.json",
                "Download all tokenizer files again, from the same source",
            )
    missing = [
        AddedToken(name, normalized=False, special=True)
        for name in names.values()
        if (token := rust.token_to_id(name)) is not None and token not in rust.get_added_tokens_decoder()
    ]
    rust.add_tokens(missing)


def _role_names(config: Mapping[str, Any]) -> dict[str, str]:
    texts = {role: _content(config.get(f"{role}_token")) for role in _ROLES}
    return {role: text for role, text in texts.items() if text is not None}


def _content(value: Any) -> str | None:
    """A token written as a string or as an object with `content`."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _stated(config: Mapping[str, Any], key: str, default: bool) -> object:
    value = config.get(key)
    return default if value is None else value


def _ends(processor: tokenizers.processors.PostProcessor | None) -> tuple[set[int], set[int]]:
    """Ids that a post-processor adds before and after a text."""
    before: set[int] = set()
    after: set[int] = set()
    for step in _steps(json.loads(processor.__getstate__())) if processor is not None else ():
        if step["type"] in ("BertProcessing", "RobertaProcessing"):
            before.add(step["cls"][1])
            after.add(step["sep"][1])
        elif step["type"] == "TemplateProcessing":
            target = before
            for item in step["single"]:
                if "Sequence" in item:
                    target = after
                else:
                    target.update(step["special_tokens"][item["SpecialToken"]["id"]]["ids"])
    return before, after


def _steps(processor: dict[str, Any]) -> list[dict[str, Any]]:
    if processor["type"] == "Sequence":
        return [step for inner in processor["processors"] for step in _steps(inner)]
    return [processor]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}", "Check the path and its permissions") from error
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not a text file in UTF-8", "Download the file again") from error
