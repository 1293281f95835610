"""Lists of keys for attention kernels at a given density, and the same as a block mask for other engines.

The positions of the keys are random for each KV head and query block, evenly spread over the sequence. Two forms:

- *fine*, as a policy selects: units of 16 keys and 64 single keys, near keys from a multiple of 64 on;
- *coarse*: blocks of 128 x 128, which other engines also support: two query blocks of 64 read the same keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

BLOCK, UNIT, COARSE, COLUMNS = 64, 16, 128, 64


@dataclass(frozen=True)
class DrawnLists:
    """The keys that query blocks read."""

    arrays: dict[str, torch.Tensor]
    """FAR, FAR_COUNT, BLOCK_COLUMNS and NEAR, as `transom_cuda_triton.routes.Lists` has them."""
    density: float
    """Keys read over keys seen, for all queries and heads."""
    coarse: torch.Tensor | None = None
    """Only for the coarse form: far blocks of 128, int32 [query blocks of 128, kv_heads, most], padded with -1."""


def spread(available: torch.Tensor, count: torch.Tensor, heads: int, seed: int) -> torch.Tensor:
    """`count` numbers of 0 … available - 1 for each row, ascending, int64 [rows, heads, most]; padded with -1."""
    device = available.device
    generator = torch.Generator(device).manual_seed(seed)
    most = max(1, int(count.max()))
    n = count.clamp(min=1)[:, None]
    phase = torch.randint(0, 1 << 30, (len(count), heads), generator=generator, device=device) % n
    at = torch.arange(most, device=device)
    found = (at * available[:, None, None] + phase[:, :, None]) // n[:, :, None]
    return torch.where(at < count[:, None, None], found, -1)


def fine(begin: torch.Tensor, queries: torch.Tensor, heads: int, density: float, near: int, seed: int) -> DrawnLists:
    """Fine lists for query blocks.

    Args:
        begin, queries: int64 [blocks]: the position of a block's first query and the number of queries.
        near: keys before a block that it always reads.
    """
    first = (begin // BLOCK * BLOCK - near).clamp(min=0)
    end = begin + queries
    available = first // UNIT
    wanted = ((density * end - (end - first) - COLUMNS) / UNIT).round().long()
    count = torch.minimum(wanted.clamp(min=0), available)
    dense = count * UNIT + COLUMNS >= first
    count, first = count.masked_fill(dense, 0), first.masked_fill(dense, 0)
    far = spread(available.clamp(min=1), count, heads, seed)
    # A single key in the unit after a far one, unless that is a far unit itself.
    places = torch.arange(COLUMNS, device=begin.device) * count[:, None] // COLUMNS
    after = far.gather(2, places[:, None].expand(-1, heads, -1).clamp(max=far.shape[2] - 1)) + 1
    free = (
        (count >= COLUMNS)[:, None, None] & (available >= 2 * count)[:, None, None] & (after < available[:, None, None])
    )
    columns = torch.where(free, after * UNIT + 5, -1)
    read = (count * UNIT)[:, None] + (columns >= 0).sum(2)
    return DrawnLists(_arrays(far, count, columns, first, heads), _density(begin, queries, first, read))


def coarse(length: int, heads: int, density: float, near: int, seed: int, device: Any) -> DrawnLists:
    """Coarse lists for a whole prompt whose length is a multiple of 128."""
    row = torch.arange(length // COARSE, device=device)
    first = (row - near // COARSE).clamp(min=0)
    wanted = (density * (row + 0.5) - (row + 0.5 - first)).round().long()
    count = torch.minimum(wanted.clamp(min=0), first)
    first = torch.where(count >= first, 0, first)
    count = torch.where(first == 0, 0, count)
    blocks = spread(first.clamp(min=1), count, heads, seed)
    per = COARSE // UNIT
    units = (blocks[..., None] * per + torch.arange(per, device=device)).flatten(2)
    units = torch.where((blocks >= 0).repeat_interleave(per, 2), units, -1)
    begin = torch.arange(length // BLOCK, device=device) * BLOCK
    twice = COARSE // BLOCK
    far, many, near_at = (x.repeat_interleave(twice, 0) for x in (units, count * per, first * COARSE))
    columns = torch.full((len(begin), heads, COLUMNS), -1, dtype=torch.int64, device=device)
    queries = torch.full_like(begin, BLOCK)
    read = (many * UNIT)[:, None].expand(-1, heads)
    arrays = _arrays(far, many, columns, near_at, heads)
    return DrawnLists(arrays, _density(begin, queries, near_at, read), blocks.int())


def _arrays(
    far: torch.Tensor, count: torch.Tensor, columns: torch.Tensor, near: torch.Tensor, heads: int
) -> dict[str, torch.Tensor]:
    def each(x: torch.Tensor) -> torch.Tensor:
        return x[:, None].expand(-1, heads).int().contiguous()

    return {
        "FAR": far.int().contiguous(), "FAR_COUNT": each(count), "BLOCK_COLUMNS": columns.int().contiguous(),
        "NEAR": each(near),
    }  # fmt: skip


def _density(begin: torch.Tensor, queries: torch.Tensor, near: torch.Tensor, listed: torch.Tensor) -> float:
    """Args:
    listed: number of keys in the list, [blocks, heads].
    """
    n = queries.double()
    seen = n * begin + n * (n + 1) / 2
    read = seen - n * near + n * listed.double().mean(1)
    return float(read.sum() / seen.sum())


def block_mask(drawn: DrawnLists, length: int, group: int) -> Any:
    """The coarse form as a `torch.nn.attention.flex_attention.BlockMask`."""
    from torch.nn.attention.flex_attention import BlockMask

    assert drawn.coarse is not None
    far = drawn.coarse
    rows, heads, most = far.shape
    device = far.device
    row = torch.arange(rows, device=device)
    near = drawn.arrays["NEAR"][:: COARSE // BLOCK, 0].long() // COARSE
    count = (far >= 0).sum(2)
    at = torch.arange(rows, device=device)
    behind = near[:, None, None] + at - count[:, :, None]
    listed = far.long().clamp(min=0)
    listed = torch.nn.functional.pad(listed, (0, max(0, rows - most)))[:, :, :rows]
    full = torch.where(at < count[:, :, None], listed, behind)
    many = count + (row - near)[:, None]
    full = torch.where(at < many[:, :, None], full, 0)

    def by_head(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(0, 1).repeat_interleave(group, 0)[None].int().contiguous()

    diagonal = torch.where(at == 0, row[:, None], 0)[:, None].expand(-1, heads, -1)
    ones = torch.ones((rows, heads), dtype=torch.int64, device=device)

    def causal(b: Any, h: Any, q: Any, k: Any) -> Any:
        return q >= k

    return BlockMask.from_kv_blocks(
        by_head(ones), by_head(diagonal), by_head(many), by_head(full), BLOCK_SIZE=COARSE, mask_mod=causal,
        seq_lengths=(length, length),
    )  # fmt: skip
