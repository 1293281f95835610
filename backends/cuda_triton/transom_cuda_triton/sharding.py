"""Shards one decoder over several cards: each has a share of the heads and the gated columns.

Tensor parallelism as in Megatron-LM (Shoeybi and others 2019, arXiv:1909.08053): matrices before attention and gates
are split by rows, those behind them by columns, so that a block needs two sums over all cards. Embedding, norms and the
vocabulary matrix are replicated on every card.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from transom.graph.weights import BlockedArrays, Dense, Weight, take_rows
from transom.programs.fusing import makers_of
from transom.programs.reading import GraphReader, Op, Value
from transom.sparsity import Sparsity

COLUMNS = 16
"""A share of columns is a multiple of this, so that every load stays aligned."""


class CannotShare(Exception):
    """The decoder cannot be split over that many cards; the message says why."""


def shard(reader: GraphReader, ranks: int, rank: int) -> None:
    """Reduce a decoder to one card's share, in place. Its sparsity policy stays that of the whole model.

    Raises:
        CannotShare: heads, columns or blocks cannot be split evenly.
    """
    _Sharding(reader, ranks, rank).run()


def sparsity_of(policy: Sparsity, heads: Sequence[int], ranks: int, rank: int) -> Sparsity:
    """The policy for one card's KV heads. `heads` are the KV heads of each layer of the whole model."""
    if policy.dense or policy.heads is None:
        return policy
    own = []
    for layer, kv_heads in zip(policy.heads, heads, strict=True):
        count = kv_heads // ranks
        own.append(tuple(layer) if len(layer) == 1 else tuple(layer[rank * count : (rank + 1) * count]))
    return replace(policy, heads=tuple(own))


class _Sharding:
    def __init__(self, reader: GraphReader, ranks: int, rank: int) -> None:
        self._reader, self._ranks, self._rank = reader, ranks, rank
        self._makers = makers_of(reader.ops)
        self._split: dict[int, Value] = {}
        """Values whose columns are split over the cards."""

    def run(self) -> None:
        reader = self._reader
        for op in reader.ops:
            if op.kind == "attend":
                self._check_heads(op.index)
                for value in op.inputs:
                    self._need(value)
                self._split[id(op.dst)] = op.dst
            elif op.kind == "glu" and all(self._can_cut(v) for v in op.inputs):
                for value in op.inputs:
                    self._need(value)
                self._split[id(op.dst)] = op.dst
        found: list[Op] = []
        for op in reader.ops:
            found += self._cut(op)
        for value in self._split.values():
            value.width //= self._ranks
        reader.ops = found
        self._cut_layers()

    def _check_heads(self, layer: int) -> None:
        cache = self._reader.decoder.layers[layer]
        if cache.q_heads % self._ranks or cache.kv_heads % self._ranks:
            raise CannotShare(
                f"layer {layer} has {cache.q_heads} heads and {cache.kv_heads} KV heads, which {self._ranks} cards "
                "cannot share evenly"
            )

    def _can_cut(self, value: Value) -> bool:
        maker = self._makers.get(id(value))
        whole = COLUMNS * self._ranks
        return maker is not None and maker.kind in ("linear", "bias") and value.width % whole == 0

    def _need(self, value: Value) -> None:
        """Split a value over the cards, and its inputs back to the product that makes it."""
        if id(value) in self._split:
            return
        self._split[id(value)] = value
        maker = self._makers.get(id(value))
        if maker is None or maker.kind in ("embed", "rows", "add", "softcap"):
            kind = "an input" if maker is None else f"the operator {maker.kind}"
            raise CannotShare(f"{kind} is between a product and the attention that reads it")
        if maker.kind == "norm" and maker.groups % self._ranks:
            raise CannotShare("a normalization over the columns of all heads together")
        if maker.kind not in ("linear", "attend", "glu"):
            for source in maker.inputs:
                self._need(source)

    def _cut(self, op: Op) -> list[Op]:
        out, ranks = id(op.dst) in self._split, self._ranks
        if op.kind == "linear":
            assert op.weight is not None
            inside = id(op.inputs[0]) in self._split
            if out and inside:
                raise CannotShare("a product whose input and output are both split over the cards")
            if out:
                rows = op.dst.width // ranks
                op.weight = take_rows(op.weight, slice(self._rank * rows, (self._rank + 1) * rows))
                op.width, op.key = rows, 0
            elif inside:
                columns = op.inputs[0].width // ranks
                op.weight = take_columns(op.weight, self._rank * columns, (self._rank + 1) * columns)
                op.key = 0
                partial = Value(op.dst.width)
                total = Op("reduce", op.dst, [partial], width=op.dst.width)
                op.dst = partial
                return [op, total]
            return [op]
        if not out:
            if op.kind != "rows" and any(id(v) in self._split for v in op.inputs):
                raise CannotShare(f"the operator {op.kind} needs all columns of a value that is split over the cards")
            return [op]
        if op.kind == "bias" and op.vector is not None:
            own = op.dst.width // ranks
            op.vector = op.vector[self._rank * own : (self._rank + 1) * own]
        if op.kind in ("norm", "rope"):
            op.groups //= ranks
        op.width = op.dst.width // ranks
        return [op]

    def _cut_layers(self) -> None:
        reader, ranks = self._reader, self._ranks
        decoder = reader.decoder
        for i, (scale, softcap, sinks) in reader.layers.items():
            if sinks is not None:
                reader.layers[i] = scale, softcap, np.split(sinks, ranks)[self._rank]
        layers = [replace(x, q_heads=x.q_heads // ranks, kv_heads=x.kv_heads // ranks) for x in decoder.layers]
        reader.decoder = replace(decoder, layers=tuple(layers))


def take_columns(weight: Weight, begin: int, end: int) -> Weight:
    """Columns of a matrix, in its stored form.

    Raises:
        CannotShare: they do not begin and end at block boundaries.
    """
    shape = (weight.shape[0], end - begin)
    if isinstance(weight, Dense):
        whole = weight.load
        return replace(weight, shape=shape, load=lambda: whole()[:, begin:end])
    inner, block = weight.load, weight.block
    if begin % block or end % block:
        raise CannotShare(f"a card's {end - begin} columns are not whole blocks of {block} columns")
    return replace(weight, shape=shape, load=lambda: _columns(inner(), begin, end, block))


def _columns(parts: BlockedArrays, begin: int, end: int, block: int) -> BlockedArrays:
    blocks = slice(begin // block, end // block)
    minimums, zeros = (None if p is None else p[:, blocks] for p in (parts.minimums, parts.zero_points))
    return BlockedArrays(parts.quants[:, begin:end], parts.scales[:, blocks], minimums, zeros)
