"""Mistral 7B and Nemo, Zephyr, Codestral, Devstral: Llama's architecture, with a sliding window in the first version.

GGUF files of this family declare the architecture `llama`, so that family reads them.

Source: Jiang et al. 2023 (arXiv:2310.06825), and `MistralForCausalLM` of transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from transom.models import block, llama
from transom.models.family import Family, sizes_from_hf
from transom.models.rope import rope_from_hf
from transom.models.tensors import Tensors
from transom.models.values import Values

if TYPE_CHECKING:
    from transom.graph import Graph

DEFAULTS = {
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 4096 * 32,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "sliding_window": 4096,
}


def from_hf(values: Values, tensors: Tensors, context: int | None) -> llama.LlamaConfig:
    values = values.with_defaults(DEFAULTS)
    if values.has("layer_types"):
        raise values.unsupported("layer_types", "Mistral has one window for all layers")
    return llama.LlamaConfig(
        **sizes_from_hf(values, lambda dim: rope_from_hf(values, dim, context)),
        activation=block.activation(values, "hidden_act"),
        sliding_window=values.whole("sliding_window", 0, low=0),
    )


def build(config: llama.LlamaConfig, tensors: Tensors) -> Graph:
    return llama.build(config, tensors, "mistral")


FAMILY = Family(
    name="mistral",
    architectures=("MistralForCausalLM",),
    model_types=("mistral",),
    gguf=(),
    from_hf=from_hf,
    from_gguf=llama.from_gguf,
    build=build,
)
