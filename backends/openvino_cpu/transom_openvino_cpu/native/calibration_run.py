"""Runs a native program on calibration texts: what it predicts, and the keys that it computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from transom.programs.written import AttentionLayer
from transom_openvino_cpu.native.engine import NativeEngine
from transom_openvino_cpu.native.layout import QUANT_BITS
from transom_openvino_cpu.native.program import NativeOp, NativeProgram

Array = np.ndarray[Any, np.dtype[Any]]

TOKENS = 192
"""Tokens of each text that are read."""
EVERY = 2
"""One position of so many has logits. Those at which int8 loses nats come in groups."""


def cut(texts: Sequence[Sequence[int]], vocabulary: int) -> list[list[int]]:
    """The tokens that are read: the first `TOKENS` of each text, or where there is none, ids over the vocabulary."""
    return [list(text[:TOKENS]) for text in texts] or [[(i * 7919 + 13) % vocabulary for i in range(TOKENS)]]


@dataclass(frozen=True)
class CalibrationRun:
    """Texts, and how a program is run on them."""

    weights: Path
    level: str
    threads: int
    texts: Sequence[Sequence[int]]
    """Each of at most `TOKENS` ids."""
    form: str
    """`"bf16"` or `"f32"`: takes the place of int8, and of float32 where a vocabulary matrix in blocks is multiplied,
    because bfloat16 takes half the time there, and two programs differ nearly as much."""

    def logits(self, program: NativeProgram, which: Sequence[int]) -> Iterator[Array]:
        """The logits of every `EVERY`-th position of each text of these numbers: float32 [positions, vocabulary].

        Raises:
            EngineError: there is not enough memory, or a layer computed numbers that are not finite.
        """
        for rows, _ in self._steps(program, which):
            yield rows

    def wide(self, program: NativeProgram) -> Iterator[tuple[Array, list[Array]]]:
        """The same of every text with no product in int8 and a float32 cache, and the keys of each layer: float32
        [kv_heads, tokens, head_dim]."""
        wide = replace(program.without_int8_products(self.form), cache="f32")
        for (rows, engine), text in zip(self._steps(wide, range(len(self.texts))), self.texts, strict=True):
            pages = self._pages(engine)
            yield (
                rows,
                [
                    _keys(engine.page_data(index, pages), layer, engine.page_tokens)[:, : len(text)]
                    for index, layer in enumerate(program.layers)
                ],
            )

    def _steps(self, program: NativeProgram, which: Sequence[int]) -> Iterator[tuple[Array, NativeEngine]]:
        ops = tuple(replace(op, by=self.form) if _is_vocabulary_in_blocks(program, op) else op for op in program.ops)
        engine = NativeEngine(replace(program, ops=ops), self.weights, self.level, self.threads)
        try:
            pages = self._pages(engine)
            engine.bind_pages(len(pages))
            for number in which:
                text = np.asarray(self.texts[number], np.int64)
                yield engine.step([text], [0], [pages], list(range(0, len(text), EVERY))), engine
        finally:
            engine.close()

    def _pages(self, engine: NativeEngine) -> list[int]:
        return list(range(-(-max(map(len, self.texts)) // engine.page_tokens)))


def _is_vocabulary_in_blocks(program: NativeProgram, op: NativeOp) -> bool:
    is_head = op.kind == "linear" and op.dst.buffer == program.output
    return is_head and program.matrices[op.matrix].kind in QUANT_BITS


def _keys(pages: Array, layer: AttentionLayer, tokens: int) -> Array:
    """The keys in pages of a float32 cache, whose layout is that of `src/cache.inl`: float32 [kv_heads, tokens,
    head_dim].

    Args:
        pages: uint8 [pages, bytes].
        tokens: of a page.
    """
    heads = pages.reshape(len(pages), layer.kv_heads, -1)[:, :, : layer.head_dim * tokens * 4]
    numbers = np.ascontiguousarray(heads).view(np.float32).reshape(len(pages), layer.kv_heads, layer.head_dim, tokens)
    return numbers.transpose(1, 0, 3, 2).reshape(layer.kv_heads, -1, layer.head_dim)
