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

from transom_openvino_cpu.native import packing
from transom_openvino_cpu.native.program import NativeOp, NativeProgram

Array = np.ndarray[Any, np.dtype[Any]]


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


TEXTS = 3
"""Texts that are enough: the large channels are nearly the same at every token of every text."""


class KeyMeans:
    """The mean key of each layer over the tokens of all texts that it was shown."""

    def __init__(self, program: NativeProgram) -> None:
        self._sums = [np.zeros((layer.kv_heads, layer.head_dim)) for layer in program.layers]
        self._tokens = 0

    def add(self, keys: Sequence[Array]) -> None:
        """Count a text.

        Args:
            keys: of each layer, float32 [kv_heads, tokens, head_dim].
        """
        for total, of_layer in zip(self._sums, keys, strict=True):
            total += of_layer.sum(1, dtype=np.float64)
        self._tokens += keys[0].shape[1] if keys else 0

    def means(self) -> list[Array]:
        """float32 [kv_heads, head_dim] of each layer."""
        return [(total / max(1, self._tokens)).astype(np.float32) for total in self._sums]


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
