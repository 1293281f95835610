"""Llama 1 to 3.x and models with the same architecture: SmolLM, SmolLM2, TinyLlama, Vicuna, Yi, DeepSeek-Coder.

Source: Touvron et al. 2023 (arXiv:2302.13971), and `LlamaForCausalLM` of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from transom.graph.weights import take_rows
from transom.models import block
from transom.models.family import COMMON_GGUF_NAMES, Config, Family, sizes_from_gguf, sizes_from_hf
from transom.models.rope import rope_from_gguf, rope_from_hf
from transom.models.tensors import Tensors
from transom.models.values import Values

if TYPE_CHECKING:
    import onnx_ir as ir

    from transom.graph import DecoderBuilder, Graph

DEFAULTS = {
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
"""The defaults of transformers for keys that config.json omits."""


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(Config):
    activation: str = "silu"
    attention_bias: bool = False
    output_bias: bool = False
    """The attention's output projection has a bias."""
    mlp_bias: bool = False
    sliding_window: int = 0
    interleaved: bool = False
    """Columns that are rotated together are stored as adjacent pairs, as in GGUF files of this family."""


def from_hf(values: Values, tensors: Tensors, context: int | None) -> LlamaConfig:
    values = values.with_defaults(DEFAULTS)
    bias = values.flag("attention_bias")
    return LlamaConfig(
        **sizes_from_hf(values, lambda dim: rope_from_hf(values, dim, context)),
        activation=block.activation(values, "hidden_act"),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=values.flag("mlp_bias"),
    )


def from_gguf(values: Values, tensors: Tensors, context: int | None) -> LlamaConfig:
    return LlamaConfig(
        **sizes_from_gguf(values, tensors, lambda dim: rope_from_gguf(values, dim, context, tensors)),
        attention_bias=tensors.has("model.layers.0.self_attn.q_proj.bias"),
        output_bias=tensors.has("model.layers.0.self_attn.o_proj.bias"),
        mlp_bias=tensors.has("model.layers.0.mlp.gate_proj.bias"),
        sliding_window=values.whole("attention.sliding_window", 0, low=0),
        interleaved=True,
    )


def build(config: LlamaConfig, tensors: Tensors, family: str = "llama") -> Graph:
    b = block.begin(family, config, [config.sliding_window] * config.layers)
    x = block.embed(b, config, tensors)
    for i in range(config.layers):
        prefix = f"model.layers.{i}"
        with b.scope(f"layers.{i}"):
            h = block.norm(b, x, config, tensors, f"{prefix}.input_layernorm")
            x = block.add(b, x, _attention(b, h, i, config, tensors, f"{prefix}.self_attn"), "attention.residual")
            h = block.norm(b, x, config, tensors, f"{prefix}.post_attention_layernorm")
            h = block.gated_mlp(b, h, config, tensors, f"{prefix}.mlp", config.activation, bias=config.mlp_bias)
            x = block.add(b, x, h, "mlp.residual")
    return block.finish(b, x, config, tensors)


def _attention(
    b: DecoderBuilder, h: ir.Value, layer: int, config: LlamaConfig, tensors: Tensors, prefix: str
) -> ir.Value:
    def project(name: str, heads: int) -> ir.Value:
        rows = heads * config.head_dim
        weight = tensors(f"{prefix}.{name}_proj.weight", rows, config.hidden)
        bias = tensors(f"{prefix}.{name}_proj.bias", rows) if config.attention_bias else None
        if config.interleaved and name != "v":
            order = halves_from_pairs(heads, config.head_dim, config.rope.rotated)
            weight, bias = take_rows(weight, order), None if bias is None else take_rows(bias, order)
        return b.linear(h, weight, name, bias)

    q = block.rotate(b, project("q", config.heads), config.heads, config, config.rope, "q.rotated")
    k = block.rotate(b, project("k", config.kv_heads), config.kv_heads, config, config.rope, "k.rotated")
    out = b.attention(q, k, project("v", config.kv_heads), layer)
    wide = config.heads * config.head_dim
    return block.linear(b, out, tensors, f"{prefix}.o_proj", config.hidden, wide, "o", bias=config.output_bias)


def halves_from_pairs(heads: int, dim: int, rotated: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Row indices that convert heads stored in pairs to heads stored in halves (0, 2, 4 … | 1, 3, 5 …), [heads * dim].

    GGUF files of this family store the rows of Q and K so that columns which are rotated together are adjacent
    (`LlamaModel.permute` of llama.cpp's converter); `RotaryEmbedding` rotates halves. This applies to the first
    `rotated` rows of each head.
    """
    head = np.arange(dim, dtype=np.int64)
    head[:rotated] = head[:rotated].reshape(rotated // 2, 2).T.reshape(-1)
    return (np.arange(heads, dtype=np.int64)[:, None] * dim + head).reshape(-1)


FAMILY = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    model_types=("llama",),
    gguf=("llama",),
    from_hf=from_hf,
    from_gguf=from_gguf,
    build=build,
    gguf_names=COMMON_GGUF_NAMES,
)
