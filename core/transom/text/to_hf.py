"""A tokenizer and a chat template as the files that other programs read: Hugging Face's form.

`transformers`, the `tokenizers` package in every language, and ONNX Runtime GenAI take them as they are. The last does
not run what `tokenizer.json` says: it has a tokenizer of its own (onnxruntime-extensions, operators/tokenizer) that
picks a few keys out of the file and passes over the others in silence. So the file is written here in a form that
means the same to `tokenizers` and is understood there:

- `ByteLevel` with its pattern, and `Digits`, become `Split` with the pattern written out: of a sequence it reads the
  `Split`s alone, and cut Python's indentation otherwise than the model had learnt it;
- a SentencePiece vocabulary gets `tokenizer_module.json`, which that tokenizer alone reads, with a class name by which
  it does not cut words out of the text with the pattern of Llama 3 first;
- a `Metaspace` decoder is put into a sequence, since alone it is not seen, and says of its dummy prefix what older
  files say.

What remains different there (texts that are not in a model's normal form, unigram vocabularies, a NUL) can be counted
with `transom.text.proving.compare`.
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
"""Read by onnxruntime-extensions after `tokenizer_config.json`, and by nobody else."""

CLASS = "PreTrainedTokenizerFast"
"""What everybody knows as "all of it is in tokenizer.json"."""
_MODULE_CLASS = "GemmaTokenizer"
"""There, of all SentencePiece vocabularies, only Gemma's is not cut by a pattern first."""


def hf_files(tokenizer: Tokenizer, template: ChatTemplate | None, generation: GenerationDefaults) -> dict[str, bytes]:
    """The files by name: `tokenizer.json`, `tokenizer_config.json`, and for some vocabularies `tokenizer_module.json`.

    Args:
        tokenizer: of the model.
        template: its chat template. Of several only the default is written, since GenAI takes one text and no list; of
            several without a default none.
        generation: names the end and padding tokens where the tokenizer has none.
    """
    description = json.loads(tokenizer.to_json())
    spoken = _spoken(description)
    files = {
        TOKENIZER: _dump(spoken),
        CONFIG: _dump(_config(tokenizer, template, generation)),
    }
    if _is_sentencepiece(spoken):
        files[MODULE] = _dump({"tokenizer_class": _MODULE_CLASS})
    return files


# ---------------------------------------------------------------------------------------------------- tokenizer.json


def _spoken(description: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer in the words that GenAI's knows."""
    changed = {**description, "truncation": None, "padding": None}
    steps = [spoken for step in _steps(changed["pre_tokenizer"], "pretokenizers") for spoken in _as_splits(step)]
    decoders = list(_steps(changed["decoder"], "decoders"))
    if steps:
        changed["pre_tokenizer"] = steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}
    if any(step["type"] == "Metaspace" for step in decoders):
        changed["decoder"] = {"type": "Sequence", "decoders": list(map(_with_prefix, decoders))}
    return changed


def _as_splits(step: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A step of a pre-tokenizer with its patterns written out."""
    if step["type"] == "Digits":
        yield _split(r"\p{N}" if step["individual_digits"] else r"\p{N}+")
    elif step["type"] == "ByteLevel" and step["use_regex"] and not step["add_prefix_space"]:
        yield _split(GPT2)
        yield {**step, "use_regex": False}
    else:
        yield step


def _with_prefix(step: dict[str, Any]) -> dict[str, Any]:
    """A step of a decoder; a `Metaspace` with the key that older files have in place of `prepend_scheme`."""
    if step["type"] != "Metaspace":
        return step
    return {**step, "add_prefix_space": step.get("prepend_scheme") != "never"}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _steps(part: dict[str, Any] | None, inside: str) -> Iterator[dict[str, Any]]:
    """The steps of a component, sequences opened."""
    if part is None:
        return
    if part["type"] == "Sequence":
        for inner in part[inside]:
            yield from _steps(inner, inside)
    else:
        yield part


def _is_sentencepiece(description: Mapping[str, Any]) -> bool:
    """BPE over text with `▁` for spaces, by what its decoder puts back."""
    return description["model"]["type"] == "BPE" and any(
        step.get("pattern", {}).get("String") == SPACE or step.get("replacement") == SPACE
        for step in _steps(description["decoder"], "decoders")
    )


# ---------------------------------------------------------------------------------------------- tokenizer_config.json


def _config(tokenizer: Tokenizer, template: ChatTemplate | None, generation: GenerationDefaults) -> dict[str, Any]:
    config: dict[str, Any] = {"tokenizer_class": CLASS, "clean_up_tokenization_spaces": False}
    if template is not None:  # templates may refer to tokens of the model's own, such as `image_token`
        named = template.variables.items()
        config.update({name: text for name, text in named if name.endswith("_token") and isinstance(text, str)})
    config.update(tokenizer.special_tokens)
    for role, token in (("eos", next(iter(generation.eos_ids), None)), ("pad", generation.pad_id)):
        text = None if token is None else tokenizer.id_to_token(token)
        if text is not None:
            config.setdefault(f"{role}_token", text)
    if _only_its_ends(tokenizer):  # otherwise the post-processor knows better than these two
        config |= {"add_bos_token": tokenizer.add_bos, "add_eos_token": tokenizer.add_eos}
    if template is not None and (source := _default(template)) is not None:
        config["chat_template"] = source
    return config


def _only_its_ends(tokenizer: Tokenizer) -> bool:
    """Whether what `encode` adds to a text is its beginning and end token and nothing else."""
    before = [tokenizer.bos_id] if tokenizer.add_bos else []
    after = [tokenizer.eos_id] if tokenizer.add_eos else []
    return tokenizer.encode("a") == [*before, *tokenizer.encode("a", add_special=False), *after]


def _default(template: ChatTemplate) -> str | None:
    sources = template.templates
    return next(iter(sources.values())) if len(sources) == 1 else sources.get("default")


def _dump(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
