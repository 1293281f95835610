"""The pages of the cache on the device: keys, values and routing nodes of each layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from transom.programs.written import AttentionLayer
from transom_cuda_triton.program import TritonProgram
from transom_cuda_triton.store import TORCH

Array = np.ndarray[Any, np.dtype[Any]]
PAGE = 64
"""Positions per page."""
NODES = 8
"""Nodes per page, each of 8 positions."""


@dataclass(frozen=True)
class LayerPages:
    """The pages of one layer; see `transom_cuda_triton.kernels` and `transom_cuda_triton.kernels.routed`."""

    k: torch.Tensor
    """[pages, kv_heads, 64, head_dim]."""
    v: torch.Tensor
    """[pages, kv_heads, 64, value_dim]."""
    means: torch.Tensor
    """[pages + side pages, kv_heads, 8, head_dim]."""
    variances: torch.Tensor
    counts: torch.Tensor
    """int32 [pages + side pages, kv_heads, 8]."""


def layer_page_bytes(layer: AttentionLayer, number: str) -> int:
    """Bytes of one page of a layer, including its nodes."""
    size = TORCH[number].itemsize
    return layer.kv_heads * (PAGE * (layer.head_dim + layer.value_dim) * size + node_bytes(layer, number))


def node_bytes(layer: AttentionLayer, number: str) -> int:
    """Bytes of the nodes of a page and KV head."""
    return NODES * (2 * layer.head_dim * TORCH[number].itemsize + 4)


def page_bytes(program: TritonProgram) -> int:
    """Bytes of one page over all layers."""
    return sum(layer_page_bytes(layer, program.number) for layer in program.layers)


def allocate(program: TritonProgram, pages: int, side_pages: int, device: torch.device) -> list[LayerPages]:
    """Allocate the caches of all layers.

    Args:
        side_pages: number of further pages, for nodes alone.
    """
    found = []
    dtype = TORCH[program.number]
    for layer in program.layers:
        nodes = (pages + side_pages, layer.kv_heads, NODES)
        found.append(
            LayerPages(
                torch.empty((pages, layer.kv_heads, PAGE, layer.head_dim), dtype=dtype, device=device),
                torch.empty((pages, layer.kv_heads, PAGE, layer.value_dim), dtype=dtype, device=device),
                torch.empty((*nodes, layer.head_dim), dtype=dtype, device=device),
                torch.empty((*nodes, layer.head_dim), dtype=dtype, device=device),
                torch.zeros(nodes, dtype=torch.int32, device=device),
            )
        )
    return found


def copy_page(caches: Sequence[LayerPages], source: int, target: int) -> None:
    """Copy a page in every layer."""
    for cache in caches:
        for tensor in (cache.k, cache.v, cache.means, cache.variances, cache.counts):
            tensor[target].copy_(tensor[source])


def _named(caches: Sequence[LayerPages]) -> Iterator[tuple[str, torch.Tensor]]:
    for i, cache in enumerate(caches):
        for name in ("k", "v", "means", "variances", "counts"):
            yield f"layer.{i}.{name}", getattr(cache, name)


def page_sizes(caches: Sequence[LayerPages]) -> dict[str, int]:
    """Bytes per page of each tensor, by name."""
    return {name: tensor[0].numel() * tensor.element_size() for name, tensor in _named(caches)}


def read_pages(caches: Sequence[LayerPages], pages: Sequence[int]) -> dict[str, Array]:
    """A copy of some pages in host memory: uint8 [pages, bytes] for each tensor."""
    found = {}
    for name, tensor in _named(caches):
        index = torch.tensor(list(pages), dtype=torch.int64, device=tensor.device)
        rows = tensor.index_select(0, index).reshape(len(pages), -1)
        found[name] = rows.contiguous().view(torch.uint8).cpu().numpy().copy()
    return found


def write_pages(caches: Sequence[LayerPages], pages: Sequence[int], arrays: Mapping[str, Array]) -> None:
    """Write the output of `read_pages`."""
    for name, tensor in _named(caches):
        index = torch.tensor(list(pages), dtype=torch.int64, device=tensor.device)
        rows = torch.from_numpy(np.array(arrays[name], copy=True)).view(tensor.dtype)
        tensor.index_copy_(0, index, rows.reshape(len(pages), *tensor.shape[1:]).to(tensor.device))
