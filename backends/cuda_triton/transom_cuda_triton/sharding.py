"""One decoder over several cards: each has a share of the heads and of the gated columns, and sums are put together.

Tensor parallelism as Shoeybi and others 2019 have it (Megatron-LM, arXiv:1909.08053): matrices before attention and
gates are cut by rows, those behind them by columns, so that a block needs two sums over all cards. Embedding, norms and
the vocabulary matrix are on every card whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from transom.graph.weights import BlockedArrays, Dense, Weight, take_rows
from transom.programs.drafting import Draft, Drafting, Value
from transom.programs.fusing import makers_of
from transom.sparsity import Sparsity

COLUMNS = 16
"""What a share of columns is a multiple of, so that every load stays aligned."""


class CannotShare(Exception):
    """The decoder cannot be cut into so many parts; the message says why."""


def shard(drafting: Drafting, ranks: int, rank: int) -> None:
    """Cut a drafted decoder down to one card's share, in place. Its sparsity policy stays that of the whole model.

    Raises:
        CannotShare: heads, columns or blocks cannot be cut into so many parts.
    """
    _Sharding(drafting, ranks, rank).run()


def sparsity_of(policy: Sparsity, heads: Sequence[int], ranks: int, rank: int) -> Sparsity:
    """A policy's share: the KV heads that a card has. `heads` are the KV heads of each layer of the whole model."""
    if policy.dense or policy.heads is None:
        return policy
    own = []
    for layer, kv_heads in zip(policy.heads, heads, strict=True):
        count = kv_heads // ranks
        own.append(tuple(layer) if len(layer) == 1 else tuple(layer[rank * count : (rank + 1) * count]))
    return replace(policy, heads=tuple(own))


class _Sharding:
    def __init__(self, drafting: Drafting, ranks: int, rank: int) -> None:
        self._drafting, self._ranks, self._rank = drafting, ranks, rank
        self._makers = makers_of(drafting.drafts)
        self._split: dict[int, Value] = {}
        """Values of which each card has its share of columns."""

    def run(self) -> None:
        drafting = self._drafting
        for draft in drafting.drafts:
            if draft.kind == "attend":
                self._check_heads(draft.index)
                for value in draft.inputs:
                    self._need(value)
                self._split[id(draft.dst)] = draft.dst
            elif draft.kind == "glu" and all(self._can_cut(v) for v in draft.inputs):
                for value in draft.inputs:
                    self._need(value)
                self._split[id(draft.dst)] = draft.dst
        found: list[Draft] = []
        for draft in drafting.drafts:
            found += self._cut(draft)
        for value in self._split.values():
            value.width //= self._ranks
        drafting.drafts = found
        self._cut_layers()

    def _check_heads(self, layer: int) -> None:
        cache = self._drafting.decoder.layers[layer]
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
        """A value of which each card is to have its share: back to the product that makes it."""
        if id(value) in self._split:
            return
        self._split[id(value)] = value
        maker = self._makers.get(id(value))
        if maker is None or maker.kind in ("embed", "rows", "add", "softcap"):
            kind = "an input" if maker is None else f"the operator {maker.kind}"
            raise CannotShare(f"{kind} lies between a product and the attention behind it")
        if maker.kind == "norm" and maker.groups % self._ranks:
            raise CannotShare("a normalisation over the columns of all heads together")
        if maker.kind not in ("linear", "attend", "glu"):
            for source in maker.inputs:
                self._need(source)

    def _cut(self, draft: Draft) -> list[Draft]:
        out, ranks = id(draft.dst) in self._split, self._ranks
        if draft.kind == "linear":
            assert draft.weight is not None
            inside = id(draft.inputs[0]) in self._split
            if out and inside:
                raise CannotShare("a product between two values that are shared")
            if out:
                rows = draft.dst.width // ranks
                draft.weight = take_rows(draft.weight, slice(self._rank * rows, (self._rank + 1) * rows))
                draft.width, draft.key = rows, 0
            elif inside:
                columns = draft.inputs[0].width // ranks
                draft.weight = take_columns(draft.weight, self._rank * columns, (self._rank + 1) * columns)
                draft.key = 0
                partial = Value(draft.dst.width)
                total = Draft("reduce", draft.dst, [partial], width=draft.dst.width)
                draft.dst = partial
                return [draft, total]
            return [draft]
        if not out:
            if draft.kind != "rows" and any(id(v) in self._split for v in draft.inputs):
                raise CannotShare(f"the operator {draft.kind} needs all columns of a value that is shared")
            return [draft]
        if draft.kind == "bias" and draft.vector is not None:
            own = draft.dst.width // ranks
            draft.vector = draft.vector[self._rank * own : (self._rank + 1) * own]
        if draft.kind in ("norm", "rope"):
            draft.groups //= ranks
        draft.width = draft.dst.width // ranks
        return [draft]

    def _cut_layers(self) -> None:
        drafting, ranks = self._drafting, self._ranks
        decoder = drafting.decoder
        for i, (scale, softcap, sinks) in drafting.layers.items():
            if sinks is not None:
                drafting.layers[i] = scale, softcap, np.split(sinks, ranks)[self._rank]
        layers = [replace(x, q_heads=x.q_heads // ranks, kv_heads=x.kv_heads // ranks) for x in decoder.layers]
        drafting.decoder = replace(decoder, layers=tuple(layers))


def take_columns(weight: Weight, begin: int, end: int) -> Weight:
    """Columns of a matrix, in the form in which it is stored.

    Raises:
        CannotShare: they do not begin and end where blocks do.
    """
    shape = (weight.shape[0], end - begin)
    if isinstance(weight, Dense):
        whole = weight.load
        return replace(weight, shape=shape, load=lambda: whole()[:, begin:end])
    inner, block = weight.load, weight.block
    if begin % block or end % block:
        raise CannotShare(f"blocks of {block} columns do not end where a card's {end - begin} columns do")
    return replace(weight, shape=shape, load=lambda: _columns(inner(), begin, end, block))


def _columns(parts: BlockedArrays, begin: int, end: int, block: int) -> BlockedArrays:
    blocks = slice(begin // block, end // block)
    minimums, zeros = (None if p is None else p[:, blocks] for p in (parts.minimums, parts.zero_points))
    return BlockedArrays(parts.quants[:, begin:end], parts.scales[:, blocks], minimums, zeros)
