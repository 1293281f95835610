"""The attention operator: appends keys and values to the cache, routes queries to keys, and computes attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from transom.programs.written import AttentionLayer
from transom.sessions.steps import BLOCK
from transom_cuda_triton.cache import LayerPages
from transom_cuda_triton.operators import power_of_two
from transom_cuda_triton.program import TritonOp, TritonProgram
from transom_cuda_triton.step import StepPart, TritonStep
from transom_cuda_triton.tiles import Tile, decode_tile, prefill_tile
from transom_cuda_triton.variants import KernelVariant

if TYPE_CHECKING:
    from transom_cuda_triton.routes import Lists

LISTS = dict.fromkeys(("FAR", "FAR_COUNT", "COLUMNS", "NEAR"), "*i32")
PLACES = dict.fromkeys(("k_page", "k_head", "v_page", "v_head", "most_pages"), "i32")
SPLITS_PER_CORE = 2
"""Programs of a decoding kernel per multiprocessor, so that one loads while another computes."""
LEAST_TILES = 4
"""Minimum tiles of keys in a split, if there are that many."""


class Attend:
    """Attention of one layer.

    Args:
        processors: number of multiprocessors of the card.
    """

    def __init__(self, op: TritonOp, program: TritonProgram, arch: int, processors: int) -> None:
        self._op, self._layer, self._processors = op, program.layers[op.index], processors
        layer, number = self._layer, program.number
        self._rotated = 2 * program.ropes[op.rope].count if op.rope >= 0 else layer.head_dim
        rest = layer.head_dim - self._rotated
        pages = {"BLOCKS": "*i32", "PAGES": "*i32"}
        self._append = KernelVariant.of(
            "append.append",
            {
                **dict.fromkeys(("NEW_K", "NEW_V", "K", "V", "MEANS", "VARIANCES"), f"*{number}"), "COS": "*fp32",
                "SIN": "*fp32", "COUNTS": "*i32", **pages, **PLACES, "k_token": "i32", "v_token": "i32",
            },
            {
                "HEAD": layer.head_dim, "VALUE": layer.value_dim, "ROTATED": self._rotated,
                "INTERLEAVED": op.interleaved, "HALF_WIDTH": power_of_two(self._rotated // 2),
                "REST_WIDTH": power_of_two(rest) if rest else 0, "VALUE_WIDTH": power_of_two(layer.value_dim),
            },
            warps=8,
        )  # fmt: skip
        reads = {
            **dict.fromkeys(("Q", "K", "V"), f"*{number}"), **pages, **LISTS, **PLACES, "factor": "fp32",
            "cap": "fp32", "window": "i32", "q_token": "i32", "most_far": "i32",
        }  # fmt: skip
        out = {"OUT": f"*{number}", "SINKS": "*fp32", "out_token": "i32"}
        flags = {"CAPPED": layer.softcap > 0, "WINDOWED": layer.window > 0}
        with_sinks = {"WITH_SINKS": layer.sinks >= 0}
        widest = max(layer.head_dim, layer.value_dim)
        tile = prefill_tile(arch, widest, number)
        heads, values = _shape(layer, tile)
        self._tiles = -(-BLOCK * layer.group // tile.rows)
        self._prefill = {
            sparse: KernelVariant.of(
                "prefill.attend_blocks", reads | out,
                {**heads, **values, "ROWS": tile.rows, "KEYS": tile.keys, "SPARSE": sparse, **flags, **with_sinks},
                tile.warps, tile.stages,
            )
            for sparse in (False, True)
        }  # fmt: skip
        single = decode_tile(arch, widest, number)
        heads, values = _shape(layer, single)
        self._rows, self._keys = max(single.rows, power_of_two(layer.group)), single.keys
        parts = {"PARTS": "*fp32", "SHARES": "*fp32"}
        self._decode = {
            sparse: KernelVariant.of(
                "decode.attend_splits", reads | parts,
                {**heads, **values, "ROWS": self._rows, "KEYS": single.keys, "SPARSE": sparse, **flags}, single.warps,
                single.stages,
            )
            for sparse in (False, True)
        }  # fmt: skip
        self._merge = KernelVariant.of(
            "decode.merge_splits", {**parts, **out, "BLOCKS": "*i32", "splits": "i32"},
            {**values, "ROWS": self._rows, **with_sinks},
        )  # fmt: skip

    def variants(self) -> Iterator[KernelVariant]:
        yield self._append
        yield from self._prefill.values()
        yield from self._decode.values()
        yield self._merge

    def run(self, step: TritonStep) -> None:
        op, layer = self._op, self._layer
        q = step.view(op.a, layer.heads * layer.head_dim, op.late)
        k = step.view(op.b, layer.kv_heads * layer.head_dim, op.late)
        v = step.view(op.c, layer.kv_heads * layer.value_dim, op.late)
        out = step.view(op.dst, layer.heads * layer.value_dim, op.late)
        cache = step.caches[op.index]
        self._keep(step, cache, k, v)
        for part in step.parts:
            lists = None
            if step.routing is not None:
                lists = step.routing.lists(step, part, op.index, q)
            self._attend(step, part, cache, q, out, lists)

    def _places(self, step: TritonStep, cache: LayerPages) -> dict[str, Any]:
        return {
            "K": cache.k, "V": cache.v, "PAGES": step.pages, "k_page": cache.k.stride(0), "k_head": cache.k.stride(1),
            "v_page": cache.v.stride(0), "v_head": cache.v.stride(1), "most_pages": step.pages.shape[1],
        }  # fmt: skip

    def _keep(self, step: TritonStep, cache: LayerPages, k: torch.Tensor, v: torch.Tensor) -> None:
        op = self._op
        cos, sin = step.store.rope(op.rope) if op.rope >= 0 else step.store.no_rope(self._rotated // 2)
        arguments = {
            **self._places(step, cache), "NEW_K": k, "NEW_V": v, "COS": cos, "SIN": sin, "MEANS": cache.means,
            "VARIANCES": cache.variances, "COUNTS": cache.counts, "BLOCKS": step.appended, "k_token": k.stride(0),
            "v_token": v.stride(0),
        }  # fmt: skip
        step.launch(self._append, (len(step.appended), self._layer.kv_heads), arguments)

    def _attend(
        self,
        step: TritonStep,
        part: StepPart,
        cache: LayerPages,
        q: torch.Tensor,
        out: torch.Tensor,
        lists: Lists | None,
    ) -> None:
        layer = self._layer
        sparse = lists is not None
        if lists is None:
            near = step.zeros(part.count * layer.kv_heads)
            listed = {"FAR": near, "FAR_COUNT": near, "COLUMNS": near, "NEAR": near, "most_far": 0}
        else:
            listed = lists.arguments()
        sinks = step.store.nothing if layer.sinks < 0 else step.store.vector(layer.sinks, layer.heads)
        arguments = {
            **self._places(step, cache), **listed, "Q": q, "BLOCKS": part.blocks, "factor": layer.scale,
            "cap": layer.softcap, "window": layer.window, "q_token": q.stride(0), "OUT": out, "SINKS": sinks,
            "out_token": out.stride(0),
        }  # fmt: skip
        if not part.single:
            step.launch(self._prefill[sparse], (part.count * self._tiles, layer.kv_heads), arguments)
            return
        splits = self.splits(part.count, part.most_keys)
        shape = (part.count, layer.kv_heads, splits)
        parts = torch.empty((*shape, self._rows, layer.value_dim), dtype=torch.float32, device=q.device)
        shares = torch.empty((*shape, 2, self._rows), dtype=torch.float32, device=q.device)
        arguments |= {"PARTS": parts, "SHARES": shares, "splits": splits}
        step.launch(self._decode[sparse], shape, arguments)
        step.launch(self._merge, shape[:2], arguments)

    def splits(self, queries: int, most_keys: int) -> int:
        """Number of programs that share the keys of a query and KV head."""
        wanted = -(-SPLITS_PER_CORE * self._processors // max(1, queries * self._layer.kv_heads))
        tiles = -(-most_keys // self._keys)
        return max(1, min(wanted, -(-tiles // LEAST_TILES)))


def _shape(layer: AttentionLayer, tile: Tile) -> tuple[dict[str, int], dict[str, int]]:
    """A layer's sizes as kernel constants: those of heads, and those of values with the group."""
    head, value = tile.head_parts(layer.head_dim), tile.value_parts(layer.value_dim)
    heads = dict(zip(("HEAD", "HEAD_REST"), head, strict=True))
    return heads, {"GROUP": layer.group, **dict(zip(("VALUE", "VALUE_REST"), value, strict=True))}
