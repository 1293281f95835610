"""Qwen3 (dense): each head of queries and keys is normalized before rotation; the width of heads is independent.

Source: Yang et al. 2025 (arXiv:2505.09388), and `Qwen3ForCausalLM` of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from transom.models import block
from transom.models.family import COMMON_GGUF_NAMES, Config, Family, sizes_from_gguf, sizes_from_hf
from transom.models.qwen2 import upper_windows
from transom.models.rope import rope_from_gguf, rope_from_hf
from transom.models.tensors import Tensors
from transom.models.values import Values

if TYPE_CHECKING:
    from transom.graph import Graph

DEFAULTS = {
    "num_key_value_heads": 32,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


@dataclass(frozen=True, kw_only=True)
class Qwen3Config(Config):
    windows: list[int]
    """Sliding window of each layer; 0: none."""
    activation: str = "silu"
    bias: bool = False
    """All four projections of attention have a bias."""


def from_hf(values: Values, tensors: Tensors, context: int | None) -> Qwen3Config:
    values = values.with_defaults(DEFAULTS)
    sizes = sizes_from_hf(values, lambda dim: rope_from_hf(values, dim, context))
    return Qwen3Config(
        **sizes,
        windows=upper_windows(values, sizes["layers"]),
        activation=block.activation(values, "hidden_act"),
        bias=values.flag("attention_bias"),
    )


def from_gguf(values: Values, tensors: Tensors, context: int | None) -> Qwen3Config:
    sizes = sizes_from_gguf(values, tensors, lambda dim: rope_from_gguf(values, dim, context, tensors))
    return Qwen3Config(**sizes, windows=[0] * sizes["layers"], bias=tensors.has("model.layers.0.self_attn.q_proj.bias"))


def build(config: Qwen3Config, tensors: Tensors) -> Graph:
    b = block.begin("qwen3", config, config.windows)
    dim, bias = config.head_dim, config.bias
    wide, kv = config.heads * dim, config.kv_heads * dim
    x = block.embed(b, config, tensors)
    for i in range(config.layers):
        layer = f"model.layers.{i}"
        attention = f"{layer}.self_attn"
        with b.scope(f"layers.{i}"):
            h = block.norm(b, x, config, tensors, f"{layer}.input_layernorm")
            q = block.linear(b, h, tensors, f"{attention}.q_proj", wide, config.hidden, "q", bias=bias)
            k = block.linear(b, h, tensors, f"{attention}.k_proj", kv, config.hidden, "k", bias=bias)
            v = block.linear(b, h, tensors, f"{attention}.v_proj", kv, config.hidden, "v", bias=bias)
            q = block.head_norm(b, q, config.heads, config, tensors(f"{attention}.q_norm.weight", dim), "q_norm")
            k = block.head_norm(b, k, config.kv_heads, config, tensors(f"{attention}.k_norm.weight", dim), "k_norm")
            q = block.rotate(b, q, config.heads, config, config.rope, "q.rotated")
            k = block.rotate(b, k, config.kv_heads, config, config.rope, "k.rotated")
            out = b.attention(q, k, v, i)
            out = block.linear(b, out, tensors, f"{attention}.o_proj", config.hidden, wide, "o", bias=bias)
            x = block.add(b, x, out, "attention.residual")
            h = block.norm(b, x, config, tensors, f"{layer}.post_attention_layernorm")
            h = block.gated_mlp(b, h, config, tensors, f"{layer}.mlp", config.activation)
            x = block.add(b, x, h, "mlp.residual")
    return block.finish(b, x, config, tensors)


FAMILY = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    model_types=("qwen3",),
    gguf=("qwen3",),
    from_hf=from_hf,
    from_gguf=from_gguf,
    build=build,
    gguf_names=COMMON_GGUF_NAMES | {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"},
)
