"""Qwen2, Qwen2.5 and QwQ: biases on queries, keys and values; upper layers may have a sliding window.

Source: Yang et al. 2024 (arXiv:2407.10671), and `Qwen2ForCausalLM` of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from transom.models import block
from transom.models.family import COMMON_GGUF_NAMES, Config, Family, layer_windows, sizes_from_gguf, sizes_from_hf
from transom.models.rope import rope_from_gguf, rope_from_hf
from transom.models.tensors import Tensors
from transom.models.values import Values

if TYPE_CHECKING:
    from transom.graph import Graph

DEFAULTS = {
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


@dataclass(frozen=True, kw_only=True)
class Qwen2Config(Config):
    windows: list[int]
    """Sliding window of each layer; 0: none."""
    activation: str = "silu"


def from_hf(values: Values, tensors: Tensors, context: int | None) -> Qwen2Config:
    values = values.with_defaults(DEFAULTS)
    sizes = sizes_from_hf(values, lambda dim: rope_from_hf(values, dim, context))
    return Qwen2Config(
        **sizes, windows=upper_windows(values, sizes["layers"]), activation=block.activation(values, "hidden_act")
    )


def upper_windows(values: Values, layers: int) -> list[int]:
    """The window of each layer: if `use_sliding_window` is set, layers from `max_window_layers` on have one."""
    window = values.whole("sliding_window", 0, low=0) if values.flag("use_sliding_window") else 0
    first = values.whole("max_window_layers", low=0) if window else layers
    return layer_windows(values, layers, window, lambda i: i >= first)


def from_gguf(values: Values, tensors: Tensors, context: int | None) -> Qwen2Config:
    sizes = sizes_from_gguf(values, tensors, lambda dim: rope_from_gguf(values, dim, context, tensors))
    return Qwen2Config(**sizes, windows=[0] * sizes["layers"])


def build(config: Qwen2Config, tensors: Tensors) -> Graph:
    b = block.begin("qwen2", config, config.windows)
    dim, wide = config.head_dim, config.heads * config.head_dim
    x = block.embed(b, config, tensors)
    for i in range(config.layers):
        layer = f"model.layers.{i}"
        attention = f"{layer}.self_attn"
        with b.scope(f"layers.{i}"):
            h = block.norm(b, x, config, tensors, f"{layer}.input_layernorm")
            kv = config.kv_heads * dim
            q = block.linear(b, h, tensors, f"{attention}.q_proj", wide, config.hidden, "q", bias=True)
            k = block.linear(b, h, tensors, f"{attention}.k_proj", kv, config.hidden, "k", bias=True)
            v = block.linear(b, h, tensors, f"{attention}.v_proj", kv, config.hidden, "v", bias=True)
            q = block.rotate(b, q, config.heads, config, config.rope, "q.rotated")
            k = block.rotate(b, k, config.kv_heads, config, config.rope, "k.rotated")
            out = b.attention(q, k, v, i)
            out = block.linear(b, out, tensors, f"{attention}.o_proj", config.hidden, wide, "o")
            x = block.add(b, x, out, "attention.residual")
            h = block.norm(b, x, config, tensors, f"{layer}.post_attention_layernorm")
            h = block.gated_mlp(b, h, config, tensors, f"{layer}.mlp", config.activation)
            x = block.add(b, x, h, "mlp.residual")
    return block.finish(b, x, config, tensors)


FAMILY = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    model_types=("qwen2",),
    gguf=("qwen2",),
    from_hf=from_hf,
    from_gguf=from_gguf,
    build=build,
    gguf_names=COMMON_GGUF_NAMES,
)
