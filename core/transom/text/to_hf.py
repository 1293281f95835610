"""Writes a tokenizer and a chat template as the Hugging Face files that other programs read.

`transformers`, the `tokenizers` package in every language, and ONNX Runtime GenAI read these files. GenAI does not
execute `tokenizer.json` as specified: its own tokenizer (onnxruntime-extensions, operators/tokenizer) reads a few keys
and silently ignores the others. So the file is written in a form that means the same to `tokenizers` and is also
understood by GenAI:

- `ByteLevel` with its pattern, and `Digits`, become `Split` with an explicit pattern. In a sequence, GenAI reads only
  `Split`, and would split Python's indentation differently from the model's training;
- a SentencePiece vocabulary gets `tokenizer_module.json`, which only GenAI's tokenizer reads. Its class name prevents
  GenAI from splitting the text with the pattern of Llama 3 first;
- a `Metaspace` decoder is wrapped in a sequence, since GenAI ignores it otherwise, and describes its dummy prefix with
  the key of older files.

`transom.text.proving.compare` counts the remaining differences (texts that are not in a model's normal form, unigram
vocabularies, NUL).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from transom.text.chat_template import ChatTemplate
from transom.text.defaults import GenerationDefaults
from transom.text.pre_tokenizers import GPT2
from transom.text.spm import SPACE
from transom.text.tokenizer import Tokenizer

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
MODULE = "tokenizer_module.json"
"""Read only by onnxruntime-extensions, after `tokenizer_config.json`."""

CLASS = "PreTrainedTokenizerFast"
"""The class that means "tokenizer.json contains everything"."""
_MODULE_CLASS = "GemmaTokenizer"
"""The only SentencePiece class for which onnxruntime-extensions does not split text with a pattern first."""


def hf_files(tokenizer: Tokenizer, template: ChatTemplate | None, generation: GenerationDefaults) -> dict[str, bytes]:
    """The files by name: `tokenizer.json`, `tokenizer_config.json`, and for some vocabularies `tokenizer_module.json`.

    Args:
        tokenizer: the model's tokenizer.
        template: its chat template. Only the default template is written, since GenAI does not support lists; none if
            there are several without a default.
        generation: provides the end and padding tokens if the tokenizer has none.
    """
    description = json.loads(tokenizer.to_json())
    adapted = _for_genai(description)
    files = {
        TOKENIZER: _dump(adapted),
        CONFIG: _dump(_config(tokenizer, template, generation)),
    }
    if _is_sentencepiece(adapted):
        files[MODULE] = _dump({"tokenizer_class": _MODULE_CLASS})
    return files


# ---------------------------------------------------------------------------------------------------- tokenizer.json


def _for_genai(description: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer, in the form that GenAI supports."""
    changed = {**description, "truncation": None, "padding": None}
    steps = [adapted for step in _steps(changed["pre_tokenizer"], "pretokenizers") for adapted in _as_splits(step)]
    decoders = list(_steps(changed["decoder"], "decoders"))
    if steps:
        changed["pre_tokenizer"] = steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}
    if any(step["type"] == "Metaspace" for step in decoders):
        changed["decoder"] = {"type": "Sequence", "decoders": list(map(_with_prefix, decoders))}
    return changed


def _as_splits(step: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A step of a pre-tokenizer, with explicit patterns."""
    if step["type"] == "Digits":
        yield _split(r"\p{N}" if step["individual_digits"] else r"\p{N}+")
    elif step["type"] == "ByteLevel" and step["use_regex"] and not step["add_prefix_space"]:
        yield _split(GPT2)
        yield {**step, "use_regex": False}
    else:
        yield step


def _with_prefix(step: dict[str, Any]) -> dict[str, Any]:
    """A step of a decoder; `Metaspace` also gets the key that older files have instead of `prepend_scheme`."""
    if step["type"] != "Metaspace":
        return step
    return {**step, "add_prefix_space": step.get("prepend_scheme") != "never"}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _steps(part: dict[str, Any] | None, inside: str) -> Iterator[dict[str, Any]]:
    """The steps of a component, with nested sequences flattened."""
    if part is None:
        return
    if part["type"] == "Sequence":
        for inner in part[inside]:
            yield from _steps(inner, inside)
    else:
        yield part


def _is_sentencepiece(description: Mapping[str, Any]) -> bool:
    """Whether this is BPE over text with `▁` for spaces, judging by its decoder."""
    return description["model"]["type"] == "BPE" and any(
        step.get("pattern", {}).get("String") == SPACE or step.get("replacement") == SPACE
        for step in _steps(description["decoder"], "decoders")
    )


# ---------------------------------------------------------------------------------------------- tokenizer_config.json


def _config(tokenizer: Tokenizer, template: ChatTemplate | None, generation: GenerationDefaults) -> dict[str, Any]:
    config: dict[str, Any] = {"tokenizer_class": CLASS, "clean_up_tokenization_spaces": False}
    if template is not None:  # templates may use tokens that are specific to the model, such as `image_token`
        named = template.variables.items()
        config.update({name: text for name, text in named if name.endswith("_token") and isinstance(text, str)})
    config.update(tokenizer.special_tokens)
    for role, token in (("eos", next(iter(generation.eos_ids), None)), ("pad", generation.pad_id)):
        text = None if token is None else tokenizer.id_to_token(token)
        if text is not None:
            config.setdefault(f"{role}_token", text)
    if _only_its_ends(tokenizer):  # otherwise only the post-processor can express it
        config |= {"add_bos_token": tokenizer.add_bos, "add_eos_token": tokenizer.add_eos}
    if template is not None and (source := _default(template)) is not None:
        config["chat_template"] = source
    return config


def _only_its_ends(tokenizer: Tokenizer) -> bool:
    """Whether `encode` adds only the beginning and end token to a text."""
    before = tokenizer.beginning
    after = [tokenizer.eos_id] if tokenizer.add_eos else []
    return tokenizer.encode("a") == [*before, *tokenizer.encode("a", add_special=False), *after]


def _default(template: ChatTemplate) -> str | None:
    sources = template.templates
    return next(iter(sources.values())) if len(sources) == 1 else sources.get("default")


def _dump(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
