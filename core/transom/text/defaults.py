"""A model's default generation settings: where generation ends, and the sampling that its authors recommend.

They are read from `generation_config.json`, `config.json`, GGUF metadata and the vocabulary, and kept in the artifact
cache. This module is on the warm start-up path, so it imports nothing heavy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from transom.errors import SourceError
from transom.typed import WrongType, typed

if TYPE_CHECKING:
    from transom.text.tokenizer import Tokenizer

_NO_LIMIT = (1 << 31) - 1
_IDS: Any = int | list[int] | None
_TEXTS: Any = str | list[str] | None

END_MARKERS = frozenset(
    {
        *("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),  # llama 3, granite
        *("<|im_end|>", "<|endoftext|>"),  # ChatML: qwen, SmolLM; GPT-2
        *("<end_of_turn>", "<eos>", "<turn|>"),  # gemma
        "<|end|>",  # phi
        *("<|return|>", "<|call|>"),  # gpt-oss
        *("<|flush|>", "<|calls|>"),  # solar-open
        *("<EOT>", "_<EOT>", "[EOT]", "[EOS]"),
        *("<end_of_utterance>", "<｜end▁of▁sentence｜>", "[e~["),  # docling, deepseek, minimax
    }
)
"""Special tokens that end a model's answer. The list is llama.cpp's (src/llama-vocab.cpp, end-of-generation tokens)
without `</s>`, which is an HTML tag in some vocabularies and the `eos` of the others."""


@dataclass(frozen=True)
class GenerationDefaults:
    """Default generation settings; None where the model's files state nothing."""

    eos_ids: tuple[int, ...] = ()
    """Tokens that end generation, ascending."""
    bos_id: int | None = None
    pad_id: int | None = None
    sample: bool | None = None
    """False: greedy, whatever the sampling values say."""
    temperature: float | None = None
    top_k: int | None = None
    """0 means no limit."""
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    suppress_ids: tuple[int, ...] = ()
    """Tokens that are never generated."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data; `from_json` reads it back."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}

    @classmethod
    def from_json(cls, data: object) -> GenerationDefaults:
        """The inverse of `to_json`. Raises WrongType."""
        return typed(cls, data)


def end_ids(tokenizer: Tokenizer) -> set[int]:
    """Ids of the tokens that end a turn or text: `eos` and the end markers that are special tokens."""
    ids = {marker: tokenizer.token_to_id(marker) for marker in END_MARKERS}
    ends = {marker: token for marker, token in ids.items() if token is not None and token in tokenizer.special_ids}
    if "<|end|>" in ends and ends.keys() & {"<|call|>", "<|calls|>"} and ends.keys() & {"<|return|>", "<|flush|>"}:
        del ends["<|end|>"]  # in gpt-oss and solar-open it ends one of several messages
    found = set(ends.values())
    return found | ({tokenizer.eos_id} if tokenizer.eos_id is not None else set())


def defaults_from_hf(
    generation_config: Mapping[str, Any], config: Mapping[str, Any], tokenizer: Tokenizer | None
) -> GenerationDefaults:
    """The defaults of a Hugging Face model.

    Args:
        generation_config: the content of generation_config.json, or an empty mapping.
        config: the content of config.json, used for special tokens that generation_config does not state.
        tokenizer: its end-of-turn tokens are added, since the files of many models state only the end of text.

    Raises:
        SourceError: a value has the wrong type or is out of range.
    """
    text = config.get("text_config")
    values = _Values(generation_config, "generation_config.json")
    others = _Values({**(text if isinstance(text, Mapping) else {}), **config}, "config.json")

    def token(key: str) -> int | None:
        found = (values if key in generation_config else others).ids(key)
        return found[0] if found else None

    ends = set((others if generation_config.get("eos_token_id") is None else values).ids("eos_token_id"))
    return GenerationDefaults(
        eos_ids=tuple(sorted(ends | (end_ids(tokenizer) if tokenizer else set()))),
        bos_id=token("bos_token_id") if tokenizer is None or tokenizer.bos_id is None else tokenizer.bos_id,
        pad_id=token("pad_token_id") if tokenizer is None or tokenizer.pad_id is None else tokenizer.pad_id,
        sample=values.flag("do_sample"),
        temperature=values.number("temperature", 0.0),
        top_k=values.count("top_k"),
        top_p=values.number("top_p", 0.0, 1.0),
        min_p=values.number("min_p", 0.0, 1.0),
        repetition_penalty=values.number("repetition_penalty", 0.0),
        max_new_tokens=values.count("max_new_tokens"),
        stop=tuple(s for s in values.texts("stop_strings") if s),  # an empty string would end every answer immediately
        suppress_ids=values.ids("suppress_tokens"),
    )


def defaults_from_gguf(metadata: Mapping[str, Any], tokenizer: Tokenizer | None) -> GenerationDefaults:
    """The defaults of a GGUF file: `general.sampling.*`, and the end tokens of its vocabulary.

    Raises:
        SourceError: a value has the wrong type or is out of range.
    """
    ends = end_ids(tokenizer) if tokenizer else set()
    for key in ("eos", "eot", "eom"):
        value = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if value is None or not hasattr(value, "__index__") or tokenizer is None:
            continue
        if 0 <= int(value) < tokenizer.vocabulary_size:
            ends.add(int(value))
    values = _Values(metadata, "the GGUF metadata", "general.sampling.")
    tokens = _Values(metadata, "the GGUF metadata", "tokenizer.ggml.")
    return GenerationDefaults(
        eos_ids=tuple(sorted(ends)),
        bos_id=tokenizer.bos_id if tokenizer else None,
        pad_id=tokenizer.pad_id if tokenizer else None,
        temperature=values.number("temp", 0.0),
        top_k=values.count("top_k"),
        top_p=values.number("top_p", 0.0, 1.0),
        min_p=values.number("min_p", 0.0, 1.0),
        repetition_penalty=values.number("penalty_repeat", 0.0),
        suppress_ids=tokens.ids("suppress_tokens"),
    )


@dataclass(frozen=True)
class _Values:
    """Reads settings; errors name the setting."""

    data: Mapping[str, Any]
    where: str
    prefix: str = ""

    def number(self, key: str, low: float, high: float = math.inf) -> float | None:
        value = self.data.get(self.prefix + key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            wanted = f"from {low:g} to {high:g}" if high < math.inf else f"of at least {low:g}"
            raise self._wrong(key, value, f"a number {wanted}")
        if not math.isfinite(value):
            raise self._wrong(key, value, "a finite number")
        return float(value)

    def count(self, key: str) -> int | None:
        value = self.data.get(self.prefix + key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value % 1:
            raise self._wrong(key, value, "a whole number")
        return min(max(int(value), 0), _NO_LIMIT)  # some files use -1 for "no limit", and others 10^30

    def texts(self, key: str) -> tuple[str, ...]:
        """A text or a list of them."""
        value = self.data.get(self.prefix + key)
        try:
            found = typed(_TEXTS, value)
        except WrongType:
            raise self._wrong(key, value, "a text or a list of texts") from None
        return (found,) if isinstance(found, str) else tuple(found or ())

    def ids(self, key: str) -> tuple[int, ...]:
        """A token id or a list of them."""
        value = self.data.get(self.prefix + key)
        try:
            found = typed(_IDS, value)
        except WrongType:
            raise self._wrong(key, value, "a token id or a list of them") from None
        return (found,) if isinstance(found, int) else tuple(found or ())

    def flag(self, key: str) -> bool | None:
        value = self.data.get(self.prefix + key)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def _wrong(self, key: str, value: object, wanted: str) -> SourceError:
        text = repr(value)
        text = text if len(text) <= 80 else text[:79] + "…"
        return SourceError(
            f"{self.prefix}{key} in {self.where} is {text}, not {wanted}", "Correct the value or remove the key"
        )
