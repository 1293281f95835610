"""OpenVINO's PagedAttention as a paged engine: the arrays of the pages, and the inputs of a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from transom_openvino_cpu import names
from transom_openvino_cpu.engine import OpenVinoEngine
from transom_openvino_cpu.page_memory import PageMemory
from transom_openvino_cpu.plan import EnginePlan

Array = np.ndarray[Any, np.dtype[Any]]

_CONTAINERS: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.float32}


class OpenVinoPages:
    """Runs the stages of an artifact over pages in its own memory."""

    page_tokens = names.PAGE_TOKENS

    def __init__(self, engine: OpenVinoEngine, plan: EnginePlan) -> None:
        assert plan.decoder is not None
        self._engine, self._decoder = engine, plan.decoder
        self._element_bytes = engine.cache_element_bytes()
        self.arrays: dict[str, Array] = {}
        self._memory: list[PageMemory] = []
        self._scratch = 0

    def page_bytes(self) -> int:
        return self._decoder.cache_bytes(names.PAGE_TOKENS, self._element_bytes)

    def bind_pages(self, pages: int) -> None:
        """Reserve all pages at once; the system commits memory as pages are written. One extra page belongs to no
        sequence: padding is written there."""
        self._scratch = pages
        container = np.dtype(_CONTAINERS[self._element_bytes])
        for i, layer in enumerate(self._decoder.layers):
            for name, dim in zip(names.cache_inputs(i), (layer.head_dim, layer.value_dim), strict=True):
                shape = (layer.kv_heads, names.PAGE_TOKENS, dim)
                memory = PageMemory(pages + 1, math.prod(shape) * container.itemsize)
                self._memory.append(memory)
                self.arrays[name] = memory.bytes.view(container).reshape(pages + 1, *shape)
        self._engine.bind_caches(self.arrays)

    def copy_page(self, source: int, target: int) -> None:
        for array in self.arrays.values():
            array[target] = array[source]

    def drop_pages(self, pages: Sequence[int]) -> None:
        for memory in self._memory:
            memory.drop(pages)

    def warm_up(self) -> None:
        """Run one token of no sequence, so that the engine repacks its weights."""
        self._engine.run(self._arguments([np.zeros(1, np.int64)], [0], [[self._scratch]], [0]), (), keep=True)
        self._engine.drop_read_pages()

    def step(
        self, tokens: Sequence[Array], past: Sequence[int], pages: Sequence[Sequence[int]], rows: Sequence[int]
    ) -> Array:
        return self._engine.run(self._arguments(tokens, past, pages, rows), ("logits",), keep=True)["logits"]

    def _arguments(
        self, tokens: Sequence[Array], past: Sequence[int], pages: Sequence[Sequence[int]], rows: Sequence[int]
    ) -> dict[str, Array]:
        """The inputs of a step, padded by an extra sequence to one of a few token counts: see `padded`."""
        counts = [len(t) for t in tokens]
        total = sum(counts)
        if padding := padded(total) - total:
            tokens, past = [*tokens, np.zeros(padding, np.int64)], [*past, 0]
            pages, counts = [*pages, [self._scratch]], [*counts, padding]
        return {
            "input_ids": np.concatenate(tokens),
            "positions": np.concatenate([p + np.arange(n, dtype=np.int64) for p, n in zip(past, counts, strict=True)]),
            "logit_rows": np.array([*rows, *[0] * (padded(len(rows)) - len(rows))], np.int64),
            names.PAST_LENGTHS: np.array(past, np.int32),
            names.BEGINS: _begins(counts),
            names.PAGES: np.concatenate([np.asarray(p, np.int32) for p in pages]),
            names.PAGE_BEGINS: _begins([len(p) for p in pages]),
            names.LONGEST: np.array(max(p + n for p, n in zip(past, counts, strict=True)), np.int32),
        }

    def close(self) -> None:
        self._engine.close()


def _begins(counts: Sequence[int]) -> Array:
    """The start of each part, and the end of the last: int32 [parts + 1]."""
    return np.array(list(accumulate(counts, initial=0)), np.int32)


def padded(count: int) -> int:
    """The size that `count` tokens (or rows of logits) are padded to, one of a small number of sizes.

    The engine keeps code and buffers, about 1 MB, for each size that it has run, and never frees them.
    """
    step = 1 if count <= 16 else 8 if count <= 128 else names.PAGE_TOKENS
    return -(-count // step) * step
