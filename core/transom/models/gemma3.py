"""Gemma 3, text only: normalized queries and keys, five windowed layers with local frequencies per global layer.

Multimodal checkpoints load as text models, without their vision tower.

Source: Gemma team 2025 (arXiv:2503.19786), and `Gemma3ForCausalLM` of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from transom.models import block, gemma2
from transom.models.family import Config, Family, layer_windows, sizes_from_gguf, sizes_from_hf
from transom.models.rope import RotaryConfig, plain, rope_from_gguf, rope_from_hf
from transom.models.tensors import Tensors
from transom.models.values import Values

if TYPE_CHECKING:
    from transom.graph import Graph

DEFAULTS = {
    **gemma2.DEFAULTS,
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "sliding_window_pattern": 6,
}
_GLOBAL_BASE, _LOCAL_BASE = 1_000_000.0, 10_000.0
_LAYERS_OF_27B = 62


@dataclass(frozen=True, kw_only=True)
class Gemma3Config(Config):
    """`rope` applies to the global layers."""

    windows: list[int]
    """Sliding window of each layer; 0: none, a global layer."""
    local: list[bool]
    """Which layers use the local frequencies."""
    local_rope: RotaryConfig
    scale: float
    """Factor applied to QKᵀ."""
    logit_softcap: float
    offset: float
    """Added to the scales of norms: 1 for Hugging Face files; 0 for GGUF files, whose scales include it."""
    activation: str = "gelu_tanh"
    bias: bool = False


def from_hf(values: Values, tensors: Tensors, context: int | None) -> Gemma3Config:
    values = values.with_defaults(DEFAULTS)
    values.one_of("use_bidirectional_attention", (False, None), None)
    values.one_of("attn_logit_softcapping", (None,), None)  # transformers reads this setting but does not use it
    table = values.inner("rope_parameters")
    far = table.inner("full_attention") if table else None
    near = table.inner("sliding_attention") if table else None
    sizes = sizes_from_hf(values, lambda dim: rope_from_hf(values, dim, context, theta=_GLOBAL_BASE, parameters=far))
    if near is not None:
        local_rope = rope_from_hf(values, sizes["head_dim"], context, theta=_LOCAL_BASE, parameters=near)
    else:
        base = values.number("rope_local_base_freq", _LOCAL_BASE, low=1e-3)
        local_rope = plain(base, sizes["head_dim"], sizes["rope"].context)
    pattern = values.whole("_sliding_window_pattern", values.whole("sliding_window_pattern"))
    kinds = layer_windows(values, sizes["layers"], 1, lambda i: (i + 1) % pattern != 0)
    window = values.whole("sliding_window", 0, low=0)
    return Gemma3Config(
        **sizes,
        windows=[window * kind for kind in kinds],
        local=[kind == 1 for kind in kinds],
        local_rope=local_rope,
        scale=values.number("query_pre_attn_scalar", low=1e-6) ** -0.5,
        logit_softcap=values.number("final_logit_softcapping", 0.0, low=0.0),
        offset=1.0,
        activation=block.activation(values, "hidden_activation"),
        bias=values.flag("attention_bias"),
    )


def from_gguf(values: Values, tensors: Tensors, context: int | None) -> Gemma3Config:
    sizes = sizes_from_gguf(
        values, tensors, lambda dim: rope_from_gguf(values, dim, context, tensors, theta=_GLOBAL_BASE)
    )
    window = values.whole("attention.sliding_window", low=0)
    local = _local_layers(values, sizes["layers"])
    base = values.number("rope.freq_base_swa", _LOCAL_BASE, low=1e-3)
    return Gemma3Config(
        **sizes,
        windows=[window if here else 0 for here in local],
        local=local,
        local_rope=plain(base, sizes["head_dim"], sizes["rope"].context),
        scale=gemma2.scale_from_gguf(values, sizes, _LAYERS_OF_27B),
        logit_softcap=values.number("final_logit_softcapping", 0.0, low=0.0),
        offset=0.0,
    )


def _local_layers(values: Values, layers: int) -> list[bool]:
    """Which layers are windowed: newer files have a flag per layer, older ones the period of the global layers."""
    key = "attention.sliding_window_pattern"
    flags = values.get(key)
    if isinstance(flags, list):
        if len(flags) != layers or not all(isinstance(flag, bool) for flag in flags):
            raise values.wrong(key, f"a list of {layers} flags")
        return flags
    pattern = values.whole(key, 6)
    return [(i + 1) % pattern != 0 for i in range(layers)]


def build(config: Gemma3Config, tensors: Tensors) -> Graph:
    b = block.begin("gemma3", config, config.windows)
    dim, offset, bias = config.head_dim, config.offset, config.bias
    wide, kv = config.heads * dim, config.kv_heads * dim
    x = block.embed(b, config, tensors, scale=config.hidden**0.5)
    for i in range(config.layers):
        layer = f"model.layers.{i}"
        attention = f"{layer}.self_attn"
        rope = config.local_rope if config.local[i] else config.rope
        with b.scope(f"layers.{i}"):
            h = block.norm(b, x, config, tensors, f"{layer}.input_layernorm", offset=offset)
            q = block.linear(b, h, tensors, f"{attention}.q_proj", wide, config.hidden, "q", bias=bias)
            k = block.linear(b, h, tensors, f"{attention}.k_proj", kv, config.hidden, "k", bias=bias)
            v = block.linear(b, h, tensors, f"{attention}.v_proj", kv, config.hidden, "v", bias=bias)
            q_norm, k_norm = (tensors(f"{attention}.{name}_norm.weight", dim) for name in "qk")
            q = block.head_norm(b, q, config.heads, config, q_norm, "q_norm", offset=offset)
            k = block.head_norm(b, k, config.kv_heads, config, k_norm, "k_norm", offset=offset)
            q = block.rotate(b, q, config.heads, config, rope, "q.rotated")
            k = block.rotate(b, k, config.kv_heads, config, rope, "k.rotated")
            out = b.attention(q, k, v, i, scale=config.scale)
            out = block.linear(b, out, tensors, f"{attention}.o_proj", config.hidden, wide, "o", bias=bias)
            out = block.norm(b, out, config, tensors, f"{layer}.post_attention_layernorm", offset=offset)
            x = block.add(b, x, out, "attention.residual")
            h = block.norm(b, x, config, tensors, f"{layer}.pre_feedforward_layernorm", offset=offset)
            h = block.gated_mlp(b, h, config, tensors, f"{layer}.mlp", config.activation)
            h = block.norm(b, h, config, tensors, f"{layer}.post_feedforward_layernorm", offset=offset)
            x = block.add(b, x, h, "mlp.residual")
    return block.finish(b, x, config, tensors, offset=offset, softcap=config.logit_softcap)


FAMILY = Family(
    name="gemma3",
    architectures=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    model_types=("gemma3_text", "gemma3"),
    gguf=("gemma3",),
    from_hf=from_hf,
    from_gguf=from_gguf,
    build=build,
    gguf_names=gemma2.GGUF_NAMES | {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"},
)
