"""The pages of the cache on the device: keys, values and routing nodes of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from transom_cuda_triton.program import Layer, Program
from transom_cuda_triton.store import TORCH

PAGE = 64
"""Positions in a page."""
NODES = 8
"""Of 8 positions each, in a page."""


@dataclass(frozen=True)
class LayerCache:
    """One layer's; see `transom_cuda_triton.kernels` and `transom_cuda_triton.kernels.routed`."""

    k: torch.Tensor
    """[pages, kv_heads, 64, head_dim]."""
    v: torch.Tensor
    """[pages, kv_heads, 64, value_dim]."""
    means: torch.Tensor
    """[pages + side pages, kv_heads, 8, head_dim]."""
    variances: torch.Tensor
    counts: torch.Tensor
    """int32 [pages + side pages, kv_heads, 8]."""


def layer_page_bytes(layer: Layer, number: str) -> int:
    """Bytes of one page of a layer, its nodes included."""
    size = TORCH[number].itemsize
    return layer.kv_heads * (PAGE * (layer.head_dim + layer.value_dim) * size + node_bytes(layer, number))


def node_bytes(layer: Layer, number: str) -> int:
    """Bytes of the nodes of a page and KV head."""
    return NODES * (2 * layer.head_dim * TORCH[number].itemsize + 4)


def page_bytes(program: Program) -> int:
    """Bytes of one page over all layers."""
    return sum(layer_page_bytes(layer, program.number) for layer in program.layers)


def allocate(program: Program, pages: int, side_pages: int, device: torch.device) -> list[LayerCache]:
    """The caches of all layers. Pages hold nothing yet.

    Args:
        side_pages: pages behind them that hold nodes alone.
    """
    found = []
    dtype = TORCH[program.number]
    for layer in program.layers:
        nodes = (pages + side_pages, layer.kv_heads, NODES)
        found.append(
            LayerCache(
                torch.empty((pages, layer.kv_heads, PAGE, layer.head_dim), dtype=dtype, device=device),
                torch.empty((pages, layer.kv_heads, PAGE, layer.value_dim), dtype=dtype, device=device),
                torch.empty((*nodes, layer.head_dim), dtype=dtype, device=device),
                torch.empty((*nodes, layer.head_dim), dtype=dtype, device=device),
                torch.zeros(nodes, dtype=torch.int32, device=device),
            )
        )
    return found


def copy_page(caches: Sequence[LayerCache], source: int, target: int) -> None:
    """All that a page holds, in every layer."""
    for cache in caches:
        for tensor in (cache.k, cache.v, cache.means, cache.variances, cache.counts):
            tensor[target].copy_(tensor[source])
