"""Gemma 2: norms before and after attention and MLP, soft caps on scores and logits, a window in every second layer.

Source: Gemma team 2024 (arXiv:2408.00118), and `Gemma2ForCausalLM` of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transom.models import block
from transom.models.family import COMMON_GGUF_NAMES, Config, Family, layer_windows, sizes_from_gguf, sizes_from_hf
from transom.models.rope import rope_from_gguf, rope_from_hf
from transom.models.tensors import Tensors
from transom.models.values import Values

if TYPE_CHECKING:
    from transom.graph import Graph

DEFAULTS = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
    "use_bidirectional_attention": False,
}
_LAYERS_OF_27B = 46


@dataclass(frozen=True, kw_only=True)
class Gemma2Config(Config):
    windows: list[int]
    """Sliding window of each layer; 0: none."""
    scale: float
    """Factor applied to QKᵀ."""
    attention_softcap: float
    logit_softcap: float
    offset: float
    """Added to the scales of norms: 1 for Hugging Face files; 0 for GGUF files, whose scales include it."""
    activation: str = "gelu_tanh"
    bias: bool = False


def from_hf(values: Values, tensors: Tensors, context: int | None) -> Gemma2Config:
    values = values.with_defaults(DEFAULTS)
    values.one_of("use_bidirectional_attention", (False, None), None)
    sizes = sizes_from_hf(values, lambda dim: rope_from_hf(values, dim, context))
    window = values.whole("sliding_window", 0, low=0)
    return Gemma2Config(
        **sizes,
        windows=layer_windows(values, sizes["layers"], window, lambda i: i % 2 == 0),
        scale=values.number("query_pre_attn_scalar", low=1e-6) ** -0.5,
        attention_softcap=values.number("attn_logit_softcapping", 0.0, low=0.0),
        logit_softcap=values.number("final_logit_softcapping", 0.0, low=0.0),
        offset=1.0,
        activation=block.activation(values, "hidden_activation"),
        bias=values.flag("attention_bias"),
    )


def from_gguf(values: Values, tensors: Tensors, context: int | None) -> Gemma2Config:
    sizes = sizes_from_gguf(values, tensors, lambda dim: rope_from_gguf(values, dim, context, tensors))
    window = values.whole("attention.sliding_window", 4096, low=0)
    return Gemma2Config(
        **sizes,
        windows=[window if i % 2 == 0 else 0 for i in range(sizes["layers"])],
        scale=scale_from_gguf(values, sizes, _LAYERS_OF_27B),
        attention_softcap=values.number("attn_logit_softcapping", 50.0, low=0.0),
        logit_softcap=values.number("final_logit_softcapping", 30.0, low=0.0),
        offset=0.0,
    )


def scale_from_gguf(values: Values, sizes: Mapping[str, Any], layers_of_27b: int) -> float:
    """The factor applied to QKᵀ. GGUF files without `attention.scale` do not state query_pre_attn_scalar either. Of the
    published sizes, only 27B (recognized by its number of layers) does not scale by the width of its heads."""
    width = sizes["hidden"] / sizes["heads"] if sizes["layers"] == layers_of_27b else sizes["head_dim"]
    return float(values.number("attention.scale", None, low=1e-6) or width**-0.5)


def build(config: Gemma2Config, tensors: Tensors) -> Graph:
    b = block.begin("gemma2", config, config.windows)
    wide, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    offset, bias = config.offset, config.bias
    x = block.embed(b, config, tensors, scale=config.hidden**0.5)
    for i in range(config.layers):
        layer = f"model.layers.{i}"
        attention = f"{layer}.self_attn"
        with b.scope(f"layers.{i}"):
            h = block.norm(b, x, config, tensors, f"{layer}.input_layernorm", offset=offset)
            q = block.linear(b, h, tensors, f"{attention}.q_proj", wide, config.hidden, "q", bias=bias)
            k = block.linear(b, h, tensors, f"{attention}.k_proj", kv, config.hidden, "k", bias=bias)
            v = block.linear(b, h, tensors, f"{attention}.v_proj", kv, config.hidden, "v", bias=bias)
            q = block.rotate(b, q, config.heads, config, config.rope, "q.rotated")
            k = block.rotate(b, k, config.kv_heads, config, config.rope, "k.rotated")
            out = b.attention(q, k, v, i, scale=config.scale, softcap=config.attention_softcap)
            out = block.linear(b, out, tensors, f"{attention}.o_proj", config.hidden, wide, "o", bias=bias)
            out = block.norm(b, out, config, tensors, f"{layer}.post_attention_layernorm", offset=offset)
            x = block.add(b, x, out, "attention.residual")
            h = block.norm(b, x, config, tensors, f"{layer}.pre_feedforward_layernorm", offset=offset)
            h = block.gated_mlp(b, h, config, tensors, f"{layer}.mlp", config.activation)
            h = block.norm(b, h, config, tensors, f"{layer}.post_feedforward_layernorm", offset=offset)
            x = block.add(b, x, h, "mlp.residual")
    return block.finish(b, x, config, tensors, offset=offset, softcap=config.logit_softcap)


GGUF_NAMES = COMMON_GGUF_NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}

FAMILY = Family(
    name="gemma2",
    architectures=("Gemma2ForCausalLM",),
    model_types=("gemma2",),
    gguf=("gemma2",),
    from_hf=from_hf,
    from_gguf=from_gguf,
    build=build,
    gguf_names=GGUF_NAMES,
)
