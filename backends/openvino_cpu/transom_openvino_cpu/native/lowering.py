"""From a drafted decoder to a program: a buffer for each value, and the weights in one file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import BinaryIO

import numpy as np

from transom.graph.weights import Array, Dense
from transom_openvino_cpu.native import packing
from transom_openvino_cpu.native.drafting import Draft, Drafting, Value
from transom_openvino_cpu.native.fusing import fuse
from transom_openvino_cpu.native.program import NOWHERE, Buffer, Layer, Op, Program, Rope, View

BARRIERS = ("attend", "rows")
"""Operators that look at other tokens than their own."""


class _Buffers:
    """Gives values their place: a buffer of the same width that nobody needs any more, or a new one."""

    def __init__(self, drafts: Sequence[Draft], logits: Value) -> None:
        self.buffers: list[Buffer] = []
        self._at: dict[int, int] = {}
        self._free: dict[tuple[int, bool], list[int]] = {}
        self._last: dict[int, int] = {}
        self._local: dict[int, bool] = {}
        self._logits = logits.root()[0]
        self.output = self._new(self._logits.width, local=False)
        self._at[id(self._logits)] = self.output
        segment = 0
        segments: dict[int, set[int]] = {}
        for i, draft in enumerate(drafts):
            barrier = draft.kind in BARRIERS
            for value in (*draft.reads(), draft.dst):
                root = id(value.root()[0])
                self._last[root] = i
                segments.setdefault(root, set()).add(-1 if barrier else segment)
            segment += barrier
        self._local = {root: len(used) == 1 and -1 not in used for root, used in segments.items()}

    def _new(self, width: int, *, local: bool) -> int:
        self.buffers.append(Buffer(width, local))
        return len(self.buffers) - 1

    def view(self, value: Value) -> View:
        root, offset = value.root()
        if id(root) not in self._at:
            local = self._local[id(root)]
            free = self._free.get((root.width, local))
            self._at[id(root)] = free.pop() if free else self._new(root.width, local=local)
        return View(self._at[id(root)], offset)

    def done(self, index: int, values: Sequence[Value]) -> None:
        """The operator `index` has run: what it read last is free."""
        for value in {id(v.root()[0]): v.root()[0] for v in values}.values():
            if self._last[id(value)] == index and value is not self._logits:
                self._free.setdefault((value.width, self._local[id(value)]), []).append(self._at[id(value)])


def write(drafting: Drafting, file: BinaryIO, progress: Callable[[float], None]) -> Program:
    """The finished program, its weights in `file`."""
    drafts = fuse(drafting)
    buffers = _Buffers(drafts, drafting.logits)
    matrices: list[packing.Packed] = []
    known: dict[tuple[int, str], int] = {}
    vectors: dict[bytes, int] = {}

    def vector(array: Array | None) -> int:
        if array is None:
            return -1
        key = np.asarray(array, np.float32).tobytes()
        if key not in vectors:
            vectors[key] = packing.write_vector(file, array)
        return vectors[key]

    def matrix(draft: Draft) -> int:
        assert draft.weight is not None
        # A table that is read both as an embedding and as the vocabulary matrix lies in the file once.
        key = (draft.key or -id(draft), draft.by if draft.by != "f32" else "")
        if key not in known:
            known[key] = len(matrices)
            to_int8 = draft.by == "int8" and isinstance(draft.weight, Dense)
            matrices.append(packing.write_matrix(file, draft.weight, narrow=draft.by == "bf16", to_int8=to_int8))
        return known[key]

    ops: list[Op] = []
    for i, draft in enumerate(drafts):
        progress(i / len(drafts))
        inputs = [buffers.view(v) for v in draft.inputs] + [NOWHERE] * 3
        residual = NOWHERE if draft.residual is None else buffers.view(draft.residual)
        dst = buffers.view(draft.dst)
        ops.append(
            Op(
                draft.kind, draft.width or draft.dst.width, dst, inputs[0],
                residual if draft.kind == "linear" else inputs[1], inputs[2],
                matrix(draft) if draft.weight is not None else -1,
                draft.groups, draft.index, draft.act, draft.by, draft.scale, vector(draft.vector),
            )
        )  # fmt: skip
        buffers.done(i, [*draft.reads(), draft.dst])
    ropes = [Rope(vector(f), int(f.size), factor) for f, factor in drafting.ropes]
    layers = []
    for i, cache in enumerate(drafting.decoder.layers):
        scale, softcap, sinks = drafting.layers[i]
        layers.append(
            Layer(
                cache.q_heads, cache.kv_heads, cache.head_dim, cache.value_dim, cache.sliding_window, scale, softcap,
                vector(sinks),
            )
        )  # fmt: skip
    return Program(
        tuple(ops), tuple(matrices), tuple(ropes), tuple(layers), tuple(buffers.buffers), drafting.precision.cache,
        buffers.output, packing.align(file), drafting.sparsity.to_string(),
    )  # fmt: skip
