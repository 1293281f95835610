"""Subtracts from the keys of each head their mean over calibration texts, so that int8 holds the rest more finely.

Every score of a query changes by the same number, which softmax does not notice (SageAttention, Zhang and others 2024,
arXiv:2410.02367, there with the mean of the sequence at hand). A mean that is known when the model is compiled is one
more operator and no state: all prefixes, forks and saved sequences have the same keys. Models with biases of keys
(Qwen2) have channels of 100 and more, which rotary embeddings turn once in 100,000 tokens; they would take the scale of
all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from transom.programs.written import AttentionLayer
from transom_openvino_cpu.native import packing
from transom_openvino_cpu.native.engine import NativeEngine
from transom_openvino_cpu.native.program import NativeOp, NativeProgram

Array = np.ndarray[Any, np.dtype[Any]]

TEXTS = 3
"""Texts that are read. A few hundred tokens are enough: the large channels are nearly the same at every token of every
text."""


def movable(program: NativeProgram) -> dict[int, NativeOp]:
    """Index among the operators -> each attention whose result does not depend on the mean of its keys.

    A soft cap and sinks do depend on it; and where keys are values, too, values would move with them.
    """
    found = {}
    for index, op in enumerate(program.ops):
        if op.kind != "attend":
            continue
        layer = program.layers[op.index]
        keys = range(op.b.offset, op.b.offset + layer.kv_heads * layer.head_dim)
        values = range(op.c.offset, op.c.offset + layer.kv_heads * layer.value_dim)
        apart = op.b.buffer != op.c.buffer or keys.stop <= values.start or values.stop <= keys.start
        if apart and not layer.softcap and layer.sinks < 0:
            found[index] = op
    return found


def measure(
    program: NativeProgram, weights: Path, level: str, threads: int, texts: Sequence[Sequence[int]], form: str
) -> list[Array]:
    """The mean key of each layer over the first `TEXTS` texts: float32 [kv_heads, head_dim].

    Args:
        form: the format of products, `"bf16"` or `"f32"`. The cache is float32.

    Raises:
        EngineError: there is not enough memory, or a layer computed numbers that are not finite.
    """
    ops = tuple(replace(op, by=form) if op.by == "int8" else op for op in program.ops)
    engine = NativeEngine(replace(program, ops=ops, cache="f32"), weights, level, threads)
    read = [np.asarray(text, np.int64) for text in texts[:TEXTS]]
    sums = [np.zeros((layer.kv_heads, layer.head_dim)) for layer in program.layers]
    try:
        pages = list(range(-(-max(map(len, read)) // engine.page_tokens)))
        engine.bind_pages(len(pages))
        for text in read:
            engine.step([text], [0], [pages], [0])
            for index, layer in enumerate(program.layers):
                keys = _keys(engine.page_data(index, pages), layer, engine.page_tokens)
                sums[index] += keys[:, : len(text)].sum(1, dtype=np.float64)
    finally:
        engine.close()
    return [(total / sum(map(len, read))).astype(np.float32) for total in sums]


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


def subtracted(program: NativeProgram, weights: Path, means: Sequence[Array]) -> NativeProgram:
    """The program with these means taken off the keys, where attention allows it; they are appended to the weights.

    Args:
        means: of each layer, float32 [kv_heads, head_dim].
    """
    places = movable(program)
    ops: list[NativeOp] = []
    with weights.open("ab") as file:
        for index, op in enumerate(program.ops):
            if index in places:
                offset = packing.write_vector(file, -means[op.index].reshape(-1))
                ops.append(NativeOp("bias", means[op.index].size, op.b, op.b, vector=offset))
            ops.append(op)
        size = packing.align(file)
    return replace(program, ops=tuple(ops), weight_bytes=size)
