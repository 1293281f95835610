"""The definition of a decoder family, and readers for the sizes that all families share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transom.errors import SourceError
from transom.models.rope import RotaryConfig
from transom.models.tensors import Tensors
from transom.models.values import Values
from transom.signature import Decoder, LayerCache

if TYPE_CHECKING:
    from transom.graph import Graph


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of a decoder. Each family adds its own fields."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    epsilon: float
    tied: bool
    """The output matrix is the embedding table."""
    rope: RotaryConfig

    def decoder(self, family: str, windows: list[int] | None = None) -> Decoder:
        """The signature of the graph; `windows`: the sliding window of each layer, 0 for none."""
        caches = (
            LayerCache(self.heads, self.kv_heads, self.head_dim, self.head_dim, window)
            for window in windows or [0] * self.layers
        )
        return Decoder(family, self.vocabulary, self.hidden, self.rope.context, tuple(caches))


Reader = Callable[[Values, Tensors, "int | None"], Any]
"""(settings, tensors, requested context) -> the family's config."""


@dataclass(frozen=True)
class Family:
    """One decoder family: how its files are recognized, read and built."""

    name: str
    architectures: tuple[str, ...]
    """Names in `architectures` of config.json."""
    model_types: tuple[str, ...]
    """Names in `model_type` of config.json."""
    gguf: tuple[str, ...]
    """Names in `general.architecture` of a GGUF file."""
    from_hf: Reader
    from_gguf: Reader
    build: Callable[[Any, Tensors], Graph]
    gguf_names: Mapping[str, str] = field(default_factory=dict)
    """Names of Hugging Face modules (in a layer or in the whole model) -> their names in a GGUF file."""


COMMON_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size")


def sizes_from_hf(values: Values, rope: Callable[[int], RotaryConfig]) -> dict[str, Any]:
    """The fields of `Config` from a config.json; `rope` makes the rotary embedding for the width of a head.

    Raises:
        SourceError: a size is missing or impossible, or the model has experts.
    """
    for key in _EXPERTS:
        if values.get(key):
            raise values.unsupported(key, "it is a mixture of experts")
    heads = values.whole("num_attention_heads", high=1 << 12)
    hidden = values.whole("hidden_size", high=1 << 20)
    width = values.whole("head_dim", None, high=1 << 14) or hidden // heads
    sizes = {
        "vocabulary": values.whole("vocab_size", high=1 << 24),
        "hidden": hidden,
        "intermediate": values.whole("intermediate_size", high=1 << 22),
        "layers": values.whole("num_hidden_layers", high=1 << 12),
        "heads": heads,
        "kv_heads": values.whole("num_key_value_heads", heads, high=heads),
        "head_dim": width,
        "epsilon": values.number("rms_norm_eps", low=0.0, high=1.0),
        "tied": values.flag("tie_word_embeddings"),
        "rope": rope(width),
    }
    _check_heads(values, "num_key_value_heads", sizes)
    return sizes


def sizes_from_gguf(values: Values, tensors: Tensors, rope: Callable[[int], RotaryConfig]) -> dict[str, Any]:
    """The fields of `Config` from a GGUF file's metadata and its embedding table.

    Raises:
        SourceError: a size is missing or impossible, or the model has a feature that no family supports.
    """
    if values.whole("expert_count", 0, low=0):
        raise values.unsupported("expert_count", "it is a mixture of experts")
    if not values.flag("attention.causal", True):
        raise values.unsupported("attention.causal", "it is an encoder")
    for key in ("embedding_scale", "residual_scale", "logit_scale"):
        if values.number(key, 1.0) != 1.0:
            raise values.unsupported(key)
    hidden = values.whole("embedding_length", high=1 << 20)
    heads = _same_in_every_layer(values, "attention.head_count", None)
    kv_heads = _same_in_every_layer(values, "attention.head_count_kv", heads)
    width = values.whole("attention.key_length", hidden // heads, high=1 << 14)
    if values.whole("attention.value_length", width) != width:
        raise values.unsupported("attention.value_length", f"keys have {width} columns")
    table = tensors.shape("model.embed_tokens.weight")
    sizes = {
        "vocabulary": table[0],
        "hidden": hidden,
        "intermediate": _same_in_every_layer(values, "feed_forward_length", None, high=1 << 22),
        "layers": values.whole("block_count", high=1 << 12),
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": width,
        "epsilon": values.number("attention.layer_norm_rms_epsilon", low=0.0, high=1.0),
        "tied": not tensors.has("lm_head.weight"),
        "rope": rope(width),
    }
    _check_heads(values, "attention.head_count_kv", sizes)
    return sizes


def layer_windows(values: Values, layers: int, window: int, sliding: Callable[[int], bool]) -> list[int]:
    """The sliding window of each layer, from the `layer_types` of a config.json, or else by the family's rule.

    Raises:
        SourceError: a layer type other than full and sliding attention.
    """
    kinds = values.get("layer_types")
    if kinds is None:
        return [window if sliding(i) else 0 for i in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise values.wrong("layer_types", f"a list of {layers} names")
    if unknown := set(map(str, kinds)) - {"full_attention", "sliding_attention"}:
        raise values.unsupported("layer_types", f"layers of the type {sorted(unknown)[0]!r}")
    return [window if kind == "sliding_attention" else 0 for kind in kinds]


def _same_in_every_layer(values: Values, key: str, default: int | None, *, high: int = 1 << 12) -> int:
    value = values.get(key)
    if isinstance(value, list):
        if not value or any(one != value[0] for one in value):
            raise values.unsupported(key, "layers differ")
        values = Values({values.prefix + key: value[0]}, values.where, values.prefix)
    found: int = values.whole(key, high=high) if default is None else values.whole(key, default, high=high)
    return found


def _check_heads(values: Values, key: str, sizes: Mapping[str, Any]) -> None:
    if sizes["heads"] % sizes["kv_heads"]:
        raise values.wrong(key, f"a divisor of the {sizes['heads']} query heads")
    if sizes["head_dim"] < 2 or sizes["head_dim"] % 2:
        raise SourceError(
            f"The heads of the model in {values.where} have {sizes['head_dim']} columns, which cannot be rotated",
            "The file is damaged or was edited by hand: download it again",
        )
