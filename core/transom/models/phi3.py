"""Phi-3, Phi-3.5 and Phi-4 (mini too): fused projections, partial rotary embedding, LongRoPE.

Source: Abdin et al. 2024 (arXiv:2404.14219), and `Phi3ForCausalLM` of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from transom.graph.weights import take_rows
from transom.models import block
from transom.models.family import COMMON_GGUF_NAMES, Config, Family, sizes_from_gguf, sizes_from_hf
from transom.models.rope import rope_from_gguf, rope_from_hf
from transom.models.tensors import Tensors
from transom.models.values import Values

if TYPE_CHECKING:
    from transom.graph import Graph

DEFAULTS = {
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "sliding_window": None,
}


@dataclass(frozen=True, kw_only=True)
class Phi3Config(Config):
    sliding_window: int
    activation: str = "silu"


def from_hf(values: Values, tensors: Tensors, context: int | None) -> Phi3Config:
    values = values.with_defaults(DEFAULTS)
    # Early checkpoints call LongRoPE "su" or, wrongly, "yarn"
    aliases = {"su": "longrope", "yarn": "longrope"}
    sizes = sizes_from_hf(values, lambda dim: rope_from_hf(values, dim, context, aliases=aliases))
    return Phi3Config(
        **sizes,
        sliding_window=values.whole("sliding_window", 0, low=0),
        activation=block.activation(values, "hidden_act"),
    )


def from_gguf(values: Values, tensors: Tensors, context: int | None) -> Phi3Config:
    return Phi3Config(
        **sizes_from_gguf(values, tensors, lambda dim: rope_from_gguf(values, dim, context, tensors)),
        sliding_window=values.whole("attention.sliding_window", 0, low=0),
    )


def build(config: Phi3Config, tensors: Tensors) -> Graph:
    b = block.begin("phi3", config, [config.sliding_window] * config.layers)
    wide, kv, inner = config.heads * config.head_dim, config.kv_heads * config.head_dim, config.intermediate
    x = block.embed(b, config, tensors)
    for i in range(config.layers):
        layer = f"model.layers.{i}"
        with b.scope(f"layers.{i}"):
            h = block.norm(b, x, config, tensors, f"{layer}.input_layernorm")
            fused = tensors(f"{layer}.self_attn.qkv_proj.weight", wide + 2 * kv, config.hidden)
            q = b.linear(h, take_rows(fused, slice(0, wide)), "q")
            k = b.linear(h, take_rows(fused, slice(wide, wide + kv)), "k")
            v = b.linear(h, take_rows(fused, slice(wide + kv, wide + 2 * kv)), "v")
            q = block.rotate(b, q, config.heads, config, config.rope, "q.rotated")
            k = block.rotate(b, k, config.kv_heads, config, config.rope, "k.rotated")
            out = b.attention(q, k, v, i)
            out = block.linear(b, out, tensors, f"{layer}.self_attn.o_proj", config.hidden, wide, "o")
            x = block.add(b, x, out, "attention.residual")
            h = block.norm(b, x, config, tensors, f"{layer}.post_attention_layernorm")
            fused = tensors(f"{layer}.mlp.gate_up_proj.weight", 2 * inner, config.hidden)
            gate = block.activate(b, b.linear(h, take_rows(fused, slice(0, inner)), "mlp.gate"), config.activation)
            up = b.linear(h, take_rows(fused, slice(inner, 2 * inner)), "mlp.up")
            h = b.op("Mul", gate, up, name="mlp.gated")
            h = block.linear(b, h, tensors, f"{layer}.mlp.down_proj", config.hidden, inner, "mlp.down")
            x = block.add(b, x, h, "mlp.residual")
    return block.finish(b, x, config, tensors)


FAMILY = Family(
    name="phi3",
    architectures=("Phi3ForCausalLM",),
    model_types=("phi3",),
    gguf=("phi3",),
    from_hf=from_hf,
    from_gguf=from_gguf,
    build=build,
    gguf_names=COMMON_GGUF_NAMES | {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"},
)
