"""Small random decoders with the features of real ones, in a few thousand weights.

Each feature that the families use is a keyword: grouped queries, sliding windows, soft caps, sinks, biases, and each
stored form of weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir

from transom.graph import Blocked, BlockedArrays, DecoderBuilder, Dense, Graph, Weight
from transom.graph.weights import dense
from transom.signature import Decoder, LayerCache

Stored = Literal["float32", "float16", "bfloat16", "int4", "uint4_minimums", "uint4_zero_points", "int8"]
Array = np.ndarray[Any, np.dtype[Any]]

BASE = "gqa"
"""The variant for checks that need no particular one."""
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "gqa": {"q_heads": 6, "kv_heads": 2},
    "multi_head": {"q_heads": 4, "kv_heads": 4},
    "multi_query": {"q_heads": 4, "kv_heads": 1},
    "window": {"window": 5},
    "softcap": {"softcap": 4.0, "final_softcap": 6.0},
    "scale": {"scale": 0.4},
    "sinks": {"sinks": True},
    "linear_bias": {"linear_bias": True},
    "attention_bias": {"attention_bias": True},
    "value_width": {"value_dim": 32},
    "partial_rotary": {"rotated": 8},
    "float16": {"weights": "float16"},
    "bfloat16": {"weights": "bfloat16"},
    "int8": {"weights": "int8"},
    "int4": {"weights": "int4"},
    "uint4_minimums": {"weights": "uint4_minimums"},
    "uint4_zero_points": {"weights": "uint4_zero_points"},
    "everything": {
        "window": 4, "softcap": 8.0, "sinks": True, "linear_bias": True, "attention_bias": True,
        "weights": "uint4_minimums",
    },
}  # fmt: skip
"""The decoders of the conformance kit by name, as keywords of `tiny_decoder`."""


class _Weights:
    """Random weights in one stored form, and a hash of all weights made."""

    def __init__(self, rng: np.random.Generator, stored: Stored, block: int) -> None:
        self._rng, self._stored, self._block = rng, stored, block
        self._hash = hashlib.blake2b(digest_size=16)

    def hash(self) -> str:
        return self._hash.hexdigest()

    def _note(self, array: Array) -> Array:
        self._hash.update(array.tobytes())
        return array

    def vector(self, size: int, center: float = 0.0, spread: float = 0.2) -> Dense:
        return dense(self._note((center + spread * self._rng.standard_normal(size)).astype(np.float32)))

    def matrix(self, rows: int, columns: int) -> Weight:
        """[rows, columns] with entries of variance 1 / columns."""
        spread = columns**-0.5
        if self._stored in ("float32", "float16", "bfloat16"):
            dtype = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[self._stored]
            return dense(self._note((self._rng.standard_normal((rows, columns)) * spread).astype(dtype)))
        blocks = (rows, columns // self._block)
        bits = 8 if self._stored == "int8" else 4
        signed = self._stored in ("int8", "int4")
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
        quants = self._rng.integers(low, high, (rows, columns)).astype(np.int8 if signed else np.uint8)
        step = spread / (high - low) * 3.5 * self._rng.uniform(0.7, 1.3, blocks)  # uniform quants: sd = range / √12
        scales = step.astype(np.float16)
        minimums = zeros = None
        if self._stored == "uint4_minimums":
            minimums = (-step * (low + high) / 2).astype(np.float16)
        if self._stored == "uint4_zero_points":
            zeros = self._rng.integers(6, 11, blocks).astype(np.uint8)
        parts = BlockedArrays(quants, scales, minimums, zeros)
        for part in parts[:4]:
            if part is not None:
                self._note(part)
        name: Any = self._stored.split("_")[0]
        return Blocked(
            (rows, columns), self._block, name, "float16", lambda: parts, minimums is not None, zeros is not None
        )


def tiny_decoder(
    rng: np.random.Generator,
    *,
    layers: int = 2,
    q_heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    value_dim: int = 0,
    vocabulary: int = 61,
    context: int = 160,
    window: int = 0,
    scale: float = 0.0,
    softcap: float = 0.0,
    final_softcap: float = 0.0,
    sinks: bool = False,
    linear_bias: bool = False,
    attention_bias: bool = False,
    rotated: int = 0,
    weights: Stored = "float32",
    block: int = 32,
    hidden: int = 64,
    inner: int = 96,
) -> Graph:
    """A decoder with random weights: embedding, `layers` blocks of attention and gated MLP, norm, tied head.

    Args:
        value_dim: columns of a value head; 0: `head_dim`.
        window: sliding window of every second layer, starting with the first; 0: none.
        attention_bias: a distance-dependent bias for each head (ALiBi, arXiv:2108.12409), computed in the graph.
        rotated: columns of each head that are rotated; 0: all.
        weights: how matrices and the embedding are stored; norms, biases and sinks are float32.
        block: block size of quantized weights; it must divide every input width.
        hidden, inner: width of the model and of its gated MLP.
    """
    value_dim = value_dim or head_dim
    caches = tuple(
        LayerCache(q_heads, kv_heads, head_dim, value_dim, window if i % 2 == 0 else 0) for i in range(layers)
    )
    b = DecoderBuilder("tiny", Decoder("tiny", vocabulary, hidden, context, caches))
    make = _Weights(rng, weights, block)
    embedding = make.matrix(vocabulary, hidden)
    x = b.op("Mul", b.embedding(embedding), b.constant(float(hidden**0.5)), name="embedding.scaled")
    tables = b.rotary_tables(b.inputs.positions, 1e4 ** (-np.arange(0, rotated or head_dim, 2) / (rotated or head_dim)))
    bias = _distances(b, q_heads) if attention_bias else None

    def linear(x: ir.Value, rows: int, columns: int, name: str) -> ir.Value:
        return b.linear(x, make.matrix(rows, columns), name, make.vector(rows) if linear_bias else None)

    for layer in range(layers):
        with b.scope(f"layers.{layer}"):
            h = b.rms_norm(x, make.vector(hidden, 1.0), 1e-5, "attention_norm")
            q = b.rotate(linear(h, q_heads * head_dim, hidden, "q"), tables, q_heads, "q.rotated", rotated=rotated)
            k = b.rotate(linear(h, kv_heads * head_dim, hidden, "k"), tables, kv_heads, "k.rotated", rotated=rotated)
            v = linear(h, kv_heads * value_dim, hidden, "v")
            a = b.attention(
                q, k, v, layer, scale=scale, softcap=softcap, bias=bias,
                sinks=make.vector(q_heads, 0.5) if sinks else None,
            )  # fmt: skip
            x = b.op("Add", x, linear(a, hidden, q_heads * value_dim, "o"), name="attended")
            h = b.rms_norm(x, make.vector(hidden, 1.0), 1e-5, "mlp_norm")
            gate = b.op("Swish", linear(h, inner, hidden, "gate"), name="activated")
            h = b.op("Mul", gate, linear(h, inner, hidden, "up"), name="gated")
            x = b.op("Add", x, linear(h, hidden, inner, "down"), name="out")
    x = b.rms_norm(b.rows_for_logits(x), make.vector(hidden, 1.0), 1e-5, "norm")
    logits = b.linear(x, embedding, "head")
    if final_softcap:
        cap = b.constant(float(final_softcap))
        logits = b.op("Mul", b.op("Tanh", b.op("Div", logits, cap)), cap, name="capped")
    return b.finish_decoder(logits, weights_hash=make.hash())


def _distances(b: DecoderBuilder, heads: int) -> ir.Value:
    """-slope * (query position - key position), [heads, tokens, past + tokens]."""
    keys = b.op("Concat", b.inputs.past_positions, b.inputs.positions, axis=0, name="bias.keys")
    rows = b.op("Unsqueeze", b.inputs.positions, b.constant([1]), name="bias.rows")
    columns = b.op("Unsqueeze", keys, b.constant([0]), name="bias.columns")
    distance = b.op("Cast", b.op("Sub", columns, rows, name="bias.distance"), to=1, name="bias.float")
    slopes = (2.0 ** -np.arange(1, heads + 1)).astype(np.float32).reshape(heads, 1, 1)
    return b.op("Mul", distance, b.constant(slopes), name="bias")
