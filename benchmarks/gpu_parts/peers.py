"""Attention and products of other engines: torch's scaled_dot_product_attention, flex_attention, FlashInfer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from gpu_parts.bench import GpuBench
from gpu_parts.lists import DrawnLists, block_mask
from gpu_parts.timing import Run
from transom_cuda_triton.store import TORCH

Arrays = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def drawn(bench: GpuBench, queries: int, keys: int) -> Arrays:
    """Random Q [1, heads, queries, head_dim], K and V [1, kv_heads, keys, head_dim]."""
    s, dtype = bench.sizes, TORCH[bench.card.number]

    def random(heads: int, count: int) -> torch.Tensor:
        return torch.randn((1, heads, count, s.head_dim), dtype=dtype, device=bench.card.device)

    return random(s.heads, queries), random(s.kv_heads, keys), random(s.kv_heads, keys)


def prompts(
    bench: GpuBench, length: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, coarse: Mapping[float, DrawnLists]
) -> Iterator[tuple[str, float, Callable[[], Run]]]:
    """(name, density, function that makes the call) of each engine."""
    yield "torch SDPA, FlashAttention", 1.0, partial(_sdpa, q, k, v, causal=True, flash=not bench.dry)
    yield "torch SDPA, as it chooses", 1.0, partial(_sdpa, q, k, v, causal=True, flash=False)
    yield "FlashInfer", 1.0, partial(_flashinfer_prompt, q, k, v)
    for found in coarse.values():
        yield (
            "flex_attention, coarse lists", found.density,
            partial(_flex, q, k, v, found, length, bench.sizes.group, compiled=not bench.dry),
        )  # fmt: skip


def tokens(caches: list[Arrays]) -> Iterator[tuple[str, Callable[[], list[Run]]]]:
    """(name, function that makes the calls, one for each cache)."""
    flash = caches[0][0].is_cuda
    yield (
        "torch SDPA, FlashAttention",
        lambda: [_sdpa(*arrays, causal=False, flash=flash) for arrays in caches],
    )
    yield "torch SDPA, as it chooses", lambda: [_sdpa(*arrays, causal=False, flash=False) for arrays in caches]
    yield "FlashInfer", lambda: [_flashinfer_token(*arrays) for arrays in caches]


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, flash: bool) -> Run:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def call() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    def with_flash() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return call()

    return with_flash if flash else call


def _flex(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, found: DrawnLists, length: int, group: int, *, compiled: bool
) -> Run:
    from torch.nn.attention.flex_attention import flex_attention

    mask = block_mask(found, length, group)
    function: Any = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention
    return lambda: function(q, k, v, block_mask=mask, enable_gqa=group > 1)


def _flashinfer_prompt(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Run:
    import flashinfer

    own = [x[0].transpose(0, 1).contiguous() for x in (q, k, v)]
    return lambda: flashinfer.single_prefill_with_kv_cache(*own, causal=True)


def _flashinfer_token(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Run:
    import flashinfer

    one, keys, values = q[0, :, 0].contiguous(), *(x[0].transpose(0, 1).contiguous() for x in (k, v))
    return lambda: flashinfer.single_decode_with_kv_cache(one, keys, values)
