"""What follows from a sparsity policy and a context before a graph is written: fixed sizes, and bytes that are read.

See `transom.sparsity.static` for the policies that have fixed sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from transom.sparsity.policy import BLOCK

if TYPE_CHECKING:
    from transom.sparsity import LayerSparsity, Sparsity

SPREAD = 128.0
"""Factor of shares of the mass that keeps their squares far from float16's smallest numbers."""
FORCED = 2 * SPREAD**2
"""Added to the score of a unit that is always read: above any score, which is at most `SPREAD` squared."""
NODE_VARIANCE = 2
"""Bytes of one number of a variance."""


@dataclass(frozen=True)
class ChoiceSizes:
    """The fixed sizes of a policy over a cache, for steps of one length."""

    rule: Sparsity
    context: int
    """C, a multiple of 64."""
    tokens: int
    """S: 1, or a multiple of 64, at most one block more than the local window."""

    @property
    def local(self) -> int:
        """Blocks of the local window."""
        return -(-self.rule.local_window // BLOCK)

    @property
    def blocks(self) -> int:
        """B."""
        return max(1, self.tokens // BLOCK)

    @property
    def places(self) -> int:
        """W."""
        return min(BLOCK, self.tokens)

    @property
    def rows(self) -> int:
        """R."""
        return min(self.rule.rows, self.tokens)

    @property
    def nodes(self) -> int:
        """N."""
        return self.context // self.rule.node

    @property
    def units(self) -> int:
        """U."""
        return self.context // self.rule.unit

    @property
    def near_blocks(self) -> int:
        """Largest number of blocks of the cache near a block of queries."""
        return min(self.local + 1, self.context // BLOCK)

    @property
    def near(self) -> int:
        """L."""
        return self.near_blocks * BLOCK

    @property
    def chosen(self) -> int:
        """Largest number of units before the local window that are read unless all are: `top_k` and the first block."""
        return self.rule.top_k + BLOCK // self.rule.unit

    @cached_property
    def far(self) -> int:
        """F: the number of chosen units, or of all units of a block that reads everything."""
        return max(1, *(self.far_read(end) for end in range(self.context)))

    @property
    def ranked(self) -> bool:
        """Whether more units are gathered than are chosen, because some blocks read everything."""
        return self.far > self.chosen

    @property
    def renewed(self) -> int:
        """Keys whose nodes are recomputed in a step."""
        return self.rule.node if self.tokens == 1 else self.tokens

    @property
    def piece(self) -> int:
        """How many of these keys are read from the cache together."""
        return min(self.renewed, BLOCK)

    @property
    def renewed_nodes(self) -> int:
        """Nodes that are recomputed in a step."""
        return self.renewed // self.rule.node

    def far_end(self, position: int) -> int:
        """Where the local window of a position's block begins."""
        return max(0, position // BLOCK - self.local) * BLOCK

    def far_read(self, end: int) -> int:
        """Units before the local window that a block of queries with this last position reads."""
        units = self.far_end(end) // self.rule.unit
        return units if self.reads_all(end) else min(self.chosen, units)

    @property
    def dense_by_density(self) -> bool:
        """Whether a block that would read most of its keys reads all of them."""
        from transom.ops.sparse_routing import DENSE_ABOVE  # its package imports onnx_ir, which probing avoids

        return self.rule.max_density * DENSE_ABOVE[1] > DENSE_ABOVE[0]

    def reads_all(self, end: int) -> bool:
        """Whether a block of queries with this last position reads every key."""
        from transom.ops.sparse_routing import DENSE_ABOVE

        rule, far_end = self.rule, self.far_end(end)
        if end < rule.dense_below or not far_end:
            return True
        read = min(self.chosen * rule.unit, far_end) + end + 1 - far_end
        return self.dense_by_density and read * DENSE_ABOVE[1] > (end + 1) * DENSE_ABOVE[0]


def unfit(policy: Sparsity, context: int, chunk: int) -> str:
    """Why a policy does not support the sizes of a context and a prefill; empty if it does."""
    if policy.dense:
        return ""
    if context % BLOCK:
        return f"Sparse attention needs a context of a multiple of {BLOCK} tokens, and {context} is not one"
    most = (ChoiceSizes(policy, context, 1).local + 1) * BLOCK
    if chunk % BLOCK or chunk > most:
        return f"Sparse attention needs a prefill of a multiple of {BLOCK} tokens up to {most}, not {chunk}"
    return ""


def sparse_heads(policy: LayerSparsity, kv_heads: int) -> tuple[int, ...]:
    """The sparse KV heads of a layer; the others read everything."""
    if policy.dense:
        return ()
    one_for_all = policy.heads is not None and len(policy.heads) == 1
    return tuple(h for h in range(kv_heads) if not policy.dense_head(0 if one_for_all else h))


@dataclass(frozen=True)
class Reads:
    """Bytes of the cache that attention reads for one new token, over all layers."""

    dense: int
    """If every key of a full context is read."""
    sparse: int
    nodes: int
    """The share of `sparse` that is means and variances."""


def reads(sizes: ChoiceSizes, heads: Sequence[tuple[int, int, int, int]], bytes_of: int) -> Reads:
    """Sum over layers.

    Args:
        sizes: sizes of a step of one token.
        heads: for each layer, sparse heads, all KV heads, and columns of keys and values.
        bytes_of: bytes of one number in the cache.
    """
    dense = sparse = nodes = 0
    for choosing, total, head_dim, value_dim in heads:
        one = (head_dim + value_dim) * bytes_of
        dense += total * sizes.context * one
        sparse += (total - choosing) * sizes.context * one
        sparse += choosing * (sizes.far * sizes.rule.unit + sizes.near) * one
        nodes += choosing * sizes.nodes * head_dim * (bytes_of + NODE_VARIANCE)
    return Reads(dense, sparse + nodes, nodes)
