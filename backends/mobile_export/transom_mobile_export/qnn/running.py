"""Runs compiled parts, one sequence at a time: the engine of a `transom.sessions.BufferedSession`.

A prompt runs through `prefill` in chunks. A short chunk is padded at its end: no token sees later ones, and keys and
values of the padding are discarded. `prefill` returns the logits of one row, the chunk's last. If all rows are needed,
the others run through `decode` as well, with the cache that `prefill` has filled before them.

With sparse attention a chunk begins at a multiple of 64 positions: rows of tokens that are already cached are padding,
too. Steps of fewer than 16 tokens run through `decode` one by one, since each of their queries chooses for itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from transom.graph.weights import Array
from transom.ops.sparse_routing import BLOCK, COLUMN_ROWS
from transom.sessions.buffered import Buffers
from transom_mobile_export.qnn.layout import QnnVariant
from transom_mobile_export.qnn.lowering import MASK, MASK_WINDOW
from transom_mobile_export.qnn.sparse_inputs import base_of, first_node, step_inputs

NODES = ("new_mean.", "new_variance.")
"""Prefixes of outputs for nodes instead of tokens."""
NEVER = 1 << 30
"""A position that no query sees."""


@dataclass(frozen=True)
class PartGraphs:
    """The two graphs of a part, as onnxruntime sessions."""

    prefill: Any
    decode: Any


class QnnEngine:
    """Runs a variant.

    Args:
        table: the embedding, float16 [vocabulary, hidden].
        graphs: the graphs of each part.
    """

    def __init__(self, variant: QnnVariant, table: Array, graphs: Sequence[PartGraphs]) -> None:
        self.variant, self._table, self._graphs = variant, table, list(graphs)
        self._window = max(layer.window for layer in variant.layers)
        self._sizes = {tokens: variant.sizes(tokens) for tokens in (1, variant.chunk)}

    def capacity(self, tokens: int) -> int:
        """The graphs' shapes are fixed."""
        return self.variant.context

    def new_buffers(self, capacity: int) -> dict[str, Array]:
        """Zeros, as codes or float16: masked entries are multiplied by zero, so they must be finite."""
        variant, sizes = self.variant, self._sizes[1]
        found: dict[str, Array] = {}
        for i, layer in enumerate(variant.layers):
            for what, columns in (("key", layer.head_dim), ("value", layer.value_dim)):
                found[f"past_{what}.{i}"] = np.zeros((1, layer.kv_heads, capacity, columns), variant.cache)
            if sizes is not None and (heads := variant.choosing(i)):
                shape = 1, len(heads), sizes.nodes, layer.head_dim
                found[f"past_mean.{i}"] = np.zeros(shape, variant.cache)
                found[f"past_variance.{i}"] = np.zeros(shape, np.float16)
        return found

    def rows(self, name: str, tokens: int) -> int:
        sizes = self._sizes[1]
        nodes = sizes is not None and name.replace("past_", "new_").startswith(NODES)
        return -(-tokens // sizes.rule.node) if nodes and sizes is not None else tokens

    def compute(self, tokens: Array, past: int, buffers: Buffers, *, every: bool) -> Array:
        """See `transom.sessions.BufferedEngine`."""
        begin = 0
        rows: list[Array] = []
        for size in self._pieces(past, len(tokens)):
            last = self._run(buffers, tokens[begin : begin + size], past + begin)
            if every:
                more = range(begin, begin + size - 1)
                rows += [self._run(buffers, tokens[i : i + 1], past + i, keep=False) for i in more]
            rows.append(last)
            begin += size
        return np.concatenate(rows) if every else last

    def _pieces(self, past: int, count: int) -> list[int]:
        """Number of tokens of each run of a step."""
        if self._sizes[1] is None:
            return [count]
        if count < COLUMN_ROWS:
            return [1] * count
        first = min(count, self.variant.chunk - past % BLOCK)
        return [first, count - first] if first < count else [first]

    def _run(self, buffers: Buffers, ids: Array, past: int, *, keep: bool = True) -> Array:
        """The logits of the last token, float32 [1, vocabulary].

        Args:
            keep: whether to write keys and values to the cache.
        """
        variant, count = self.variant, len(ids)
        size = 1 if count == 1 else variant.chunk
        sizes = self._sizes[size]
        base = past if sizes is None else base_of(sizes, past)
        at = slice(past - base, past - base + count)
        """The rows of the tokens."""
        hidden = np.zeros((1, size, variant.hidden), np.float32)
        hidden[0, at] = self._table[ids].astype(np.float32) * np.float32(variant.scale)
        positions = base + np.arange(size)
        inputs: dict[str, Array] = {
            "hidden": hidden, "positions": np.minimum(positions, variant.context - 1)[None].astype(np.int32),
            "row": np.array([at.stop - 1], np.int32), MASK: self._mask(positions, past, 0),
        }  # fmt: skip
        if sizes is not None:
            inputs |= step_inputs(sizes, past, count, variant.mask_low)
        if self._window:
            inputs[MASK_WINDOW] = self._mask(positions, past, self._window)
        new: dict[str, Array] = {}
        outputs: dict[str, Array] = {}
        for graphs in self._graphs:
            session = graphs.decode if count == 1 else graphs.prefill
            wanted = [v.name for v in session.get_inputs()]
            given = {name: buffers[name] if name.startswith("past_") else inputs[name] for name in wanted}
            outputs = dict(zip([v.name for v in session.get_outputs()], session.run(None, given), strict=True))
            inputs["hidden"] = outputs.pop("hidden_out", inputs["hidden"])
            new |= {name: array for name, array in outputs.items() if name.startswith("new_")}
        if keep:
            for name, array in new.items():
                cache = buffers[name.replace("new_", "past_")]
                if sizes is not None and name.startswith(NODES):
                    first = first_node(sizes, past)
                    cache[:, :, first : first + array.shape[2]] = array[:, :, : cache.shape[2] - first]
                else:
                    cache[:, :, past : past + count] = array[:, :, at]
        return np.asarray(outputs["logits"], np.float32).reshape(1, -1)

    def _mask(self, positions: Array, past: int, window: int) -> Array:
        """float32 [1, 1, S, C + S]: 0 for each token that a new token sees; the cache first, then the new tokens."""
        context, low = self.variant.context, self.variant.mask_low
        own = np.where(positions < past, NEVER, positions)
        at = np.concatenate([np.where(np.arange(context) < past, np.arange(context), NEVER), own])
        behind = positions[:, None] - at[None]
        seen = (behind >= 0) & ((behind < window) | (window == 0))
        return np.where(seen, 0.0, low).astype(np.float32)[None, None]

    def close(self) -> None:
        self._graphs.clear()
