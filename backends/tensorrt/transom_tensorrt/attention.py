"""Attention over a cache of fixed size, [batch, heads, positions, columns], in the operators that TensorRT fuses.

New keys and values are written to the cache in place (TensorRT's `KVCacheUpdate`, ONNX's `TensorScatter`). All queries
then attend to the whole cache through a mask. TensorRT's fused kernels support no soft cap, no sinks and no float32:
such attention is written as two products and a softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from transom.programs.onnx_writing import BOOL, FLOAT, INT64, OnnxWriter
from transom_tensorrt.forms import rounded_to_float8

if TYPE_CHECKING:
    from transom.graph.weights import Array
    from transom.signature import LayerCache

LEAST = -1e30
"""Stands in for minus infinity in a softmax: such a key gets no mass, and no difference is NaN."""


@dataclass(frozen=True)
class LayerAttention:
    """The parameters of one layer's attention."""

    cache: LayerCache
    scale: float
    softcap: float
    sinks: Array | None

    def window(self, positions: int) -> int:
        """How many of `positions` a query sees; 0: all."""
        return self.cache.sliding_window if self.cache.sliding_window < positions else 0

    def of(self, heads: Sequence[int]) -> LayerAttention:
        """The same attention with only these KV heads."""
        group = self.cache.q_heads // self.cache.kv_heads
        sinks = None if self.sinks is None else np.asarray(self.sinks).reshape(-1, group)[list(heads)].reshape(-1)
        return replace(self, cache=replace(self.cache, q_heads=group * len(heads), kv_heads=len(heads)), sinks=sinks)

    def fused(self, number: ir.DataType) -> bool:
        """Whether TensorRT has a fused kernel for it."""
        plain = not self.softcap and self.sinks is None and self.cache.head_dim == self.cache.value_dim
        return plain and number != FLOAT


@dataclass
class Places:
    """Positions of the tokens of a step, from which every layer's masks are made.

    Shapes: B sequences, each with S new tokens; C positions in the cache.
    """

    write: OnnxWriter
    past: ir.Value
    """int64 [B]: tokens of each sequence that are already cached."""
    positions: ir.Value
    """int64 [B, S]."""
    context: int
    """C."""

    def __post_init__(self) -> None:
        self._masks: dict[int, ir.Value] = {}

    def visible(self, window: int) -> ir.Value:
        """bool [B, 1, S, C]: the positions that each new token sees. With a `window` of 0 it sees all up to its own."""
        if window not in self._masks:
            w = self.write
            at = w.constant(np.arange(self.context, dtype=np.int64))
            own = w("Unsqueeze", self.positions, w.ints([1, 3]))  # [B, 1, S, 1]
            seen = w("LessOrEqual", at, own, dtype=BOOL)
            if window:
                first = w("Sub", own, w.ints(window))
                seen = w("And", seen, w("Greater", at, first, dtype=BOOL))
            self._masks[window] = seen
        return self._masks[window]


@dataclass(frozen=True)
class Fused:
    """An attention node of the ONNX model that TensorRT can fuse, with the names of its inputs; see `building`."""

    name: str
    """Name of the node."""
    query: str
    keys: str
    values: str
    mask: str
    """Empty: each token sees all tokens before it."""
    float8: bool = False
    """Whether queries, keys and values are quantized to E4M3, so that the softmax must be too."""


def attend(
    w: OnnxWriter,
    layer: LayerAttention,
    q: ir.Value,
    keys: ir.Value,
    values: ir.Value,
    mask: ir.Value,
    *,
    sinks: ir.Value | None = None,
    scales: tuple[float, float, float] | None = None,
) -> ir.Value:
    """[B, query heads, S, value columns].

    Args:
        q: [B, query heads, S, columns], scaled, with the dtype of the keys.
        keys, values: [B, KV heads, C, columns].
        mask: bool [B, 1, S, C].
        sinks: float32 [1 or B, KV heads, G, 1, 1].
        scales: E4M3 scales of queries, keys and values; None: they are not quantized.
    """
    number = keys.dtype
    assert number is not None
    if layer.fused(number):
        inputs = [q, keys, values]
        if scales is not None:
            inputs = [rounded_to_float8(w, x, s) for x, s in zip(inputs, scales, strict=True)]
        return w("Attention", *inputs, mask, is_causal=0, scale=1.0)
    kv_heads, group = layer.cache.kv_heads, layer.cache.q_heads // layer.cache.kv_heads
    grouped = w("Reshape", q, w.ints([0, kv_heads, group, -1, layer.cache.head_dim]))  # [B, KV, G, S, D]
    turned = w("Unsqueeze", w("Transpose", keys, perm=[0, 1, 3, 2]), w.ints([2]))
    scores = w.cast(w("MatMul", grouped, turned), FLOAT)  # [B, KV, G, S, C]
    scores = w.softcapped(scores, layer.softcap)
    scores = w("Where", w("Unsqueeze", mask, w.ints([1])), scores, w.number(LEAST, FLOAT), dtype=FLOAT)
    if sinks is None:
        shares = w("Softmax", scores, axis=-1)
    else:
        top = w("Max", w("ReduceMax", scores, w.ints([-1]), keepdims=1), sinks)
        weights = w("Exp", w("Sub", scores, top))
        total = w("Add", w("ReduceSum", weights, w.ints([-1]), keepdims=1), w("Exp", w("Sub", sinks, top)))
        shares = w("Div", weights, total)
    out = w("MatMul", w.cast(shares, number), w("Unsqueeze", values, w.ints([2])))  # [B, KV, G, S, Dv]
    return w("Reshape", out, w.ints([0, layer.cache.q_heads, -1, layer.cache.value_dim]))


def heads(w: OnnxWriter, rows: ir.Value, places: Places, count: int, columns: int) -> ir.Value:
    """Reshape rows of a step, [B * S, count * columns], to [B, count, S, columns]."""
    sizes = w("Concat", w("Shape", places.positions, dtype=INT64), w.ints([count, columns]), axis=0)
    return w("Transpose", w("Reshape", rows, sizes), perm=[0, 2, 1, 3])


def rows_of(w: OnnxWriter, x: ir.Value, width: int) -> ir.Value:
    """The inverse of `heads`: [B, count, S, columns] to [B * S, width]."""
    return w("Reshape", w("Transpose", x, perm=[0, 2, 1, 3]), w.ints([-1, width]))
