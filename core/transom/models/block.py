"""Building blocks shared by decoder families: embedding, projections, norms, gated MLP, output matrix.

Modules have their Hugging Face names. Each function writes nodes and returns the new hidden state, [tokens, hidden].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from transom.errors import SourceError
from transom.models.family import Config
from transom.models.rope import RotaryConfig
from transom.models.tensors import Tensors
from transom.models.values import Values

if TYPE_CHECKING:
    import onnx_ir as ir

    from transom.graph import DecoderBuilder, Graph, Weight

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def activation(values: Values, key: str) -> str:
    """The activation named in a config.json, in the form that `activate` takes.

    Raises:
        SourceError: the activation is unknown.
    """
    return ACTIVATIONS[values.one_of(key, tuple(ACTIVATIONS))]


def begin(family: str, config: Config, windows: list[int]) -> DecoderBuilder:
    """A builder for the family's graph; `windows`: the sliding window of each layer, 0 for none."""
    # Imported here: processes that only look up a family by name need no ONNX.
    from transom.graph import DecoderBuilder

    return DecoderBuilder(family, config.decoder(family, windows))


def activate(b: DecoderBuilder, x: ir.Value, kind: str) -> ir.Value:
    """x through an activation: `silu`, `gelu` or `gelu_tanh`."""
    if kind == "silu":
        return b.op("Swish", x, name="mlp.activation")
    return b.op("Gelu", x, approximate="tanh" if kind == "gelu_tanh" else "none", name="mlp.activation")


def embed(b: DecoderBuilder, config: Config, tensors: Tensors, *, scale: float = 1.0) -> ir.Value:
    """Rows of the embedding table for the new tokens, times `scale`."""
    x = b.embedding(tensors("model.embed_tokens.weight", config.vocabulary, config.hidden))
    return x if scale == 1.0 else b.op("Mul", x, b.constant(float(scale)), name="embedding.scaled")


def norm(
    b: DecoderBuilder, x: ir.Value, config: Config, tensors: Tensors, name: str, *, offset: float = 0.0
) -> ir.Value:
    """RMS normalization with the weights of the module `name`."""
    short = name.rpartition(".")[2]
    return b.rms_norm(x, tensors(f"{name}.weight", config.hidden), config.epsilon, short, offset=offset)


def head_norm(
    b: DecoderBuilder, x: ir.Value, heads: int, config: Config, scale: Weight, name: str, *, offset: float = 0.0
) -> ir.Value:
    """RMS normalization of each head of [tokens, heads * head_dim] separately."""
    split = b.op("Reshape", x, b.constant([0, heads, config.head_dim]), name=f"{name}.heads")
    normed = b.rms_norm(split, scale, config.epsilon, name, offset=offset)
    return b.op("Reshape", normed, b.constant([0, heads * config.head_dim]), name=f"{name}.flat")


def rotate(b: DecoderBuilder, x: ir.Value, heads: int, config: Config, rope: RotaryConfig, name: str) -> ir.Value:
    """Rotary embedding of x by the tokens' positions."""
    tables = b.rotary_tables(b.inputs.positions, rope.frequencies, factor=rope.factor)
    partial = rope.rotated if rope.rotated != config.head_dim else 0
    return b.rotate(x, tables, heads, name, rotated=partial)


def linear(
    b: DecoderBuilder,
    x: ir.Value,
    tensors: Tensors,
    module: str,
    out: int,
    into: int,
    name: str,
    *,
    bias: bool = False,
) -> ir.Value:
    """x @ weightᵀ + bias with the parameters of a module; weight [out, into]."""
    weight = tensors(f"{module}.weight", out, into)
    return b.linear(x, weight, name, tensors(f"{module}.bias", out) if bias else None)


def gated_mlp(
    b: DecoderBuilder, x: ir.Value, config: Config, tensors: Tensors, prefix: str, kind: str, *, bias: bool = False
) -> ir.Value:
    """down(activation(gate(x)) * up(x))."""
    inner, hidden = config.intermediate, config.hidden
    gate = linear(b, x, tensors, f"{prefix}.gate_proj", inner, hidden, "mlp.gate", bias=bias)
    up = linear(b, x, tensors, f"{prefix}.up_proj", inner, hidden, "mlp.up", bias=bias)
    gated = b.op("Mul", activate(b, gate, kind), up, name="mlp.gated")
    return linear(b, gated, tensors, f"{prefix}.down_proj", hidden, inner, "mlp.down", bias=bias)


def add(b: DecoderBuilder, residual: ir.Value, x: ir.Value, name: str) -> ir.Value:
    """residual + x."""
    return b.op("Add", residual, x, name=name)


def finish(
    b: DecoderBuilder, x: ir.Value, config: Config, tensors: Tensors, *, offset: float = 0.0, softcap: float = 0.0
) -> Graph:
    """Add the final normalization, output matrix and soft cap (c * tanh(x / c)); returns the finished graph."""
    x = b.rms_norm(
        b.rows_for_logits(x), tensors("model.norm.weight", config.hidden), config.epsilon, "final_norm", offset=offset
    )
    name = "model.embed_tokens.weight" if config.tied else "lm_head.weight"
    if config.tied and tensors.has("lm_head.weight"):
        tensors.mark_used("lm_head.weight")  # a redundant copy in some files
    logits = b.linear(x, tensors(name, config.vocabulary, config.hidden), "lm_head")
    if tensors.has("lm_head.bias"):
        raise SourceError(
            f"The output matrix in {tensors.checkpoint.where} has a bias (lm_head.bias); this family supports none",
            "Export the model to ONNX, and load that file",
        )
    if softcap:
        cap = b.constant(float(softcap))
        logits = b.op("Mul", b.op("Tanh", b.op("Div", logits, cap, name="softcap.in"), name="softcap"), cap)
    return b.finish_decoder(logits, weights_hash=tensors.weights_hash, notes=config.rope.notes)
