"""`genai_config.json`, which describes the model, its caches, special tokens and sampling to ONNX Runtime GenAI."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transom.text.defaults import GenerationDefaults
from transom_mobile_export.onnx.compiling import CHUNK, MODEL_FILE

LENGTH = 2048
"""Default `max_length` of a sequence in tokens: GenAI allocates and fills the whole cache before the first one."""
_NAMES = "{}.%d.{}"


def genai_config(
    decoder: Mapping[str, Any], variant: Mapping[str, Any], generation: GenerationDefaults
) -> dict[str, Any]:
    """The configuration of one variant.

    Args:
        decoder: the object of that name in the manifest.
        variant: the variant's object in the manifest; its `name` is the model's folder, its `context` the longest
            sequence.
    """
    layers, first = decoder["layers"], decoder["layers"][0]
    model: dict[str, Any] = {
        "type": "decoder",
        "vocab_size": decoder["vocabulary"],
        "context_length": variant["context"],
        "eos_token_id": list(generation.eos_ids),
        "pad_token_id": padding(generation),
        "decoder": {
            "filename": variant["files"][MODEL_FILE],
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            "hidden_size": decoder["hidden"],
            "num_hidden_layers": len(layers),
            "num_attention_heads": first["q_heads"],
            "num_key_value_heads": first["kv_heads"],
            "head_size": first["head_dim"],
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                "past_key_names": _NAMES.format("past_key_values", "key"),
                "past_value_names": _NAMES.format("past_key_values", "value"),
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": _NAMES.format("present", "key"),
                "present_value_names": _NAMES.format("present", "value"),
            },
        },
    }
    if generation.bos_id is not None:
        model["bos_token_id"] = generation.bos_id
    return {"model": model, "search": _search(variant["context"], decoder["vocabulary"], generation)}


def padding(generation: GenerationDefaults) -> int:
    """The token that pads shorter prompts of a batch: GenAI requires one for every model."""
    return generation.pad_id if generation.pad_id is not None else next(iter(generation.eos_ids), 0)


def _search(context: int, vocabulary: int, generation: GenerationDefaults) -> dict[str, Any]:
    """Default sampling: as the model's authors recommend, otherwise greedy. The rules are those of
    `transom.generation.params`."""
    implied = 1.0 if generation.sample else 0.0
    temperature = implied if generation.temperature is None else generation.temperature
    return {
        "do_sample": generation.sample is not False and temperature > 0,
        "max_length": min(context, LENGTH),
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": True,
        "chunk_size": CHUNK,
        "repetition_penalty": generation.repetition_penalty or 1.0,
        "temperature": temperature or 1.0,
        "top_k": min(generation.top_k or 0, vocabulary),  # GenAI refuses more when it chooses the first token
        "top_p": generation.top_p or 1.0,
    }
