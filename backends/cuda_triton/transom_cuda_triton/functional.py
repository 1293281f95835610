"""Block-sparse attention over a paged cache as a function, for who brings lists of his own.

The engine's lists are made on the device and are right by construction. Here everything is looked at first, which costs
a round trip to the device: a list that is out of order or out of range would read keys twice, or memory of others.
Kernels are compiled by Triton when they are first needed, or interpreted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from transom_cuda_triton.tiles import Tile, decode_tile, prefill_tile

PAGE, UNIT = 64, 16
NUMBERS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Lists:
    """What query blocks read; shapes and words are those of `transom_cuda_triton.kernels`. All int32."""

    far: torch.Tensor
    """[blocks, kv_heads, most_far], ascending."""
    far_count: torch.Tensor
    """[blocks, kv_heads]."""
    columns: torch.Tensor
    """[blocks, kv_heads, 64], -1 where there is none."""
    near: torch.Tensor
    """[blocks, kv_heads]."""


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: torch.Tensor,
    pages: torch.Tensor,
    lists: Lists | None = None,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int = 0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of query blocks.

    Args:
        q: [tokens, heads, head_dim], rotated, float16, bfloat16 or float32.
        k: [pages, kv_heads, 64, head_dim].
        v: [pages, kv_heads, 64, value_dim].
        blocks: int32 [blocks, 4]: sequence, first row, first position, queries; a block ends within its 64 positions.
        pages: int32 [sequences, most_pages].
        lists: what is read; None: everything.
        scale: None: head_dim ** -0.5.
        window: positions that a query sees; 0: all.
        sinks: float32 [heads].

    Returns:
        [tokens, heads, value_dim], as `q`; rows of no block are 0.

    Raises:
        ValueError: devices or types differ, shapes do not fit together, no tile serves the head size, or a block, page
            or list is out of order or out of range.
    """
    _check_tensors(q, k, v, blocks, pages, lists, sinks)
    _check_places(q, k, blocks, pages)
    if lists is not None:
        _check_lists(blocks, lists)
    from transom_cuda_triton.kernels.decode import attend_splits, merge_splits
    from transom_cuda_triton.kernels.prefill import attend_blocks

    heads, head_dim = q.shape[1:]
    kv_heads, value_dim = v.shape[1], v.shape[3]
    group, count, out = (
        heads // kv_heads,
        len(blocks),
        torch.zeros((len(q), heads, value_dim), dtype=q.dtype, device=q.device),
    )
    if not count:
        return out
    nothing = torch.zeros(count * kv_heads, dtype=torch.int32, device=q.device)
    listed = {"FAR": nothing, "FAR_COUNT": nothing, "COLUMNS": nothing, "NEAR": nothing, "most_far": 0}
    if lists is not None:
        listed = {
            "FAR": lists.far, "FAR_COUNT": lists.far_count, "COLUMNS": lists.columns, "NEAR": lists.near,
            "most_far": lists.far.shape[2],
        }  # fmt: skip
    single = bool((blocks[:, 3] <= 1).all())
    tile = _tile(q, max(head_dim, value_dim), single=single)
    shape = dict(zip(("HEAD", "HEAD_REST"), tile.head_parts(head_dim), strict=True))
    values = dict(zip(("VALUE", "VALUE_REST"), tile.value_parts(value_dim), strict=True)) | {"GROUP": group}
    reading = {
        "Q": q, "K": k, "V": v, "BLOCKS": blocks, "PAGES": pages, **listed,
        "factor": head_dim**-0.5 if scale is None else scale, "cap": softcap, "window": window,
        "q_token": q.stride(0), "k_page": k.stride(0), "k_head": k.stride(1), "v_page": v.stride(0),
        "v_head": v.stride(1), "most_pages": pages.shape[1], **shape, "KEYS": tile.keys, "SPARSE": lists is not None,
        "CAPPED": softcap > 0, "WINDOWED": window > 0,
    }  # fmt: skip
    ending = {"OUT": out, "SINKS": sinks, "out_token": out.stride(0), "WITH_SINKS": sinks is not None}
    how = {} if q.device.type == "cpu" else {"num_warps": tile.warps, "num_stages": tile.stages}
    if not single:
        tiles = -(-PAGE * group // tile.rows)
        attend_blocks[(count * tiles, kv_heads)](**reading, **values, **ending, ROWS=tile.rows, **how)
        return out
    rows, splits = max(tile.rows, 1 << (group - 1).bit_length()), max(1, min(16, pages.shape[1]))
    parts = torch.empty((count, kv_heads, splits, rows, value_dim), dtype=torch.float32, device=q.device)
    shares = torch.empty((count, kv_heads, splits, 2, rows), dtype=torch.float32, device=q.device)
    attend_splits[(count, kv_heads, splits)](PARTS=parts, SHARES=shares, **reading, **values, ROWS=rows, **how)
    merge_splits[(count, kv_heads)](
        PARTS=parts, SHARES=shares, BLOCKS=blocks, splits=splits, ROWS=rows, **values, **ending
    )  # fmt: skip
    return out


def _tile(q: torch.Tensor, size: int, *, single: bool) -> Tile:
    arch = 0
    if q.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(q.device)
        arch = 10 * major + minor
    return (decode_tile if single else prefill_tile)(arch, size, NUMBERS[q.dtype])


def _need(right: bool, what: str) -> None:
    if not right:
        raise ValueError(what)


def _check_tensors(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: torch.Tensor,
    pages: torch.Tensor,
    lists: Lists | None,
    sinks: torch.Tensor | None,
) -> None:
    numbers, whole = {"q": q, "k": k, "v": v}, {"blocks": blocks, "pages": pages}
    if lists is not None:
        whole |= {f"lists.{name}": getattr(lists, name) for name in ("far", "far_count", "columns", "near")}
    everything = {**numbers, **whole} | ({} if sinks is None else {"sinks": sinks})
    devices = {str(t.device) for t in everything.values()}
    _need(len(devices) == 1, f"the tensors are on different devices: {', '.join(sorted(devices))}")
    types = {t.dtype for t in numbers.values()}
    _need(
        len(types) == 1 and q.dtype in NUMBERS,
        f"q, k and v are {types}: one of float16, bfloat16 and float32 is needed",
    )
    for name, tensor in whole.items():
        _need(tensor.dtype == torch.int32, f"{name} is {tensor.dtype}, not int32")
        _need(tensor.is_contiguous(), f"{name} is not contiguous")
    for name, tensor in everything.items():
        wanted = {"q": 3, "k": 4, "v": 4, "blocks": 2, "pages": 2, "lists.far": 3, "lists.columns": 3, "sinks": 1}
        _need(tensor.dim() == wanted.get(name, 2), f"{name} has {tensor.dim()} axes, not {wanted.get(name, 2)}")
    _need(q.is_contiguous() and k.is_contiguous() and v.is_contiguous(), "q, k and v have to be contiguous")
    heads, head_dim = q.shape[1:]
    kv_heads = k.shape[1]
    _need(k.shape[2] == PAGE and v.shape[2] == PAGE, f"pages of k and v have {PAGE} positions, not {k.shape[2]}")
    _need(k.shape[:2] == v.shape[:2], f"k {tuple(k.shape)} and v {tuple(v.shape)} have different pages or heads")
    _need(k.shape[3] == head_dim, f"keys have {k.shape[3]} columns and queries {head_dim}")
    _need(heads % kv_heads == 0, f"{heads} heads are no multiple of {kv_heads} KV heads")
    _need(blocks.shape[1] == 4, f"blocks have {blocks.shape[1]} numbers, not 4")
    _need(
        sinks is None or (len(sinks) == heads and sinks.dtype == torch.float32), "sinks are float32, one for each head"
    )
    for size in (head_dim, v.shape[3]):
        _need(size % UNIT == 0, f"heads of {size} columns: a multiple of {UNIT} is needed")
        _tile(q, size, single=False).head_parts(size)  # ValueError for what no tile serves
    if lists is not None:
        own = (len(blocks), kv_heads)
        shapes = {"far": (*own, lists.far.shape[2]), "far_count": own, "columns": (*own, PAGE), "near": own}
        for name, shape in shapes.items():
            found = tuple(getattr(lists, name).shape)
            _need(found == shape, f"lists.{name} is {list(found)}, not {list(shape)}")


def _check_places(q: torch.Tensor, k: torch.Tensor, blocks: torch.Tensor, pages: torch.Tensor) -> None:
    if not len(blocks):
        return
    sequence, row, first, count = blocks.long().unbind(1)
    end = first + count
    _need(bool((count >= 1).all()), "a block has no queries")
    _need(bool(((sequence >= 0) & (sequence < len(pages))).all()), "a block is of a sequence that has no pages")
    _need(bool(((row >= 0) & (row + count <= len(q))).all()), "a block has rows that q has not")
    _need(bool(((first >= 0) & (first // PAGE == (end - 1) // PAGE)).all()), "a block goes beyond its 64 positions")
    needed = (end - 1) // PAGE + 1
    _need(bool((needed <= pages.shape[1]).all()), f"a sequence is longer than the table of {pages.shape[1]} pages")
    for of, most in zip(sequence.tolist(), needed.tolist(), strict=True):
        own = pages[of, :most]
        _need(
            bool(((own >= 0) & (own < len(k))).all()),
            f"sequence {of} has a page that is none of the {len(k)} there are",
        )


def _check_lists(blocks: torch.Tensor, lists: Lists) -> None:
    end = (blocks[:, 2] + blocks[:, 3])[:, None]
    near, count = lists.near, lists.far_count
    _need(
        bool(((near >= 0) & (near % PAGE == 0) & (near < end)).all()),
        "near is no multiple of 64 before the block's end",
    )
    _need(bool(((count >= 0) & (count <= lists.far.shape[2])).all()), "far_count is outside the list")
    place = torch.arange(lists.far.shape[2], device=count.device)
    there = place < count[..., None]
    inside = (lists.far >= 0) & ((lists.far + 1) * UNIT <= near[..., None])
    _need(bool((inside | ~there).all()), "a far unit is out of range: units lie before the near part")
    rising = lists.far[..., 1:] > lists.far[..., :-1]
    _need(bool((rising | ~there[..., 1:]).all()), "far units are out of order, or one is there twice")
    columns = lists.columns
    _need(
        bool(((columns >= -1) & (columns < near[..., None])).all()),
        "a column is out of range: columns lie before the near part",
    )
    sorted_, _ = columns.sort(-1)
    twice = (sorted_[..., 1:] == sorted_[..., :-1]) & (sorted_[..., 1:] >= 0)
    _need(not bool(twice.any()), "a column is there twice")
    in_list = (columns[..., None] // UNIT == lists.far[..., None, :]) & (columns[..., None] >= 0) & there[..., None, :]
    _need(not bool(in_list.any()), "a column lies in a far unit of its block: its key would count twice")
