"""From a drafted decoder to a program: a buffer for each value, and the weights in one file."""

from __future__ import annotations

from collections.abc import Callable
from typing import BinaryIO

import numpy as np

from transom.graph.weights import Array, Dense
from transom.programs import fusing
from transom.programs.drafting import Draft, Drafting, Value
from transom.programs.placing import Placing
from transom.programs.written import NOWHERE, AttentionLayer, RopeTable, View
from transom_openvino_cpu.native import packing
from transom_openvino_cpu.native.packing import TILE
from transom_openvino_cpu.native.program import Op, Program
from transom_openvino_cpu.precision import Precision

BARRIERS = ("attend", "rows")
"""Operators that look at other tokens than their own."""


def fuse(drafting: Drafting) -> list[Draft]:
    """The same program in fewer operators: residuals and biases inside products, products of one input together,
    gates and rotations without a copy."""
    drafts = fusing.fuse_scales(list(drafting.drafts))
    drafts = fusing.fuse_biases(drafts)
    drafts = fusing.fuse_gates(drafts, TILE)
    drafts = fusing.fuse_residuals(drafts)
    drafts = fusing.fuse_same_input(drafts, TILE)
    return fusing.in_place(drafts, drafting.logits)


def write(drafting: Drafting, precision: Precision, file: BinaryIO, progress: Callable[[float], None]) -> Program:
    """The finished program, its weights in `file`."""
    drafts = fuse(drafting)
    placing = Placing(drafts, drafting.logits, BARRIERS)
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

    def view(value: Value) -> View:
        return placing.place(value)

    ops: list[Op] = []
    for i, draft in enumerate(drafts):
        progress(i / len(drafts))
        inputs = [view(v) for v in draft.inputs] + [NOWHERE] * 3
        residual = NOWHERE if draft.residual is None else view(draft.residual)
        dst = view(draft.dst)
        ops.append(
            Op(
                draft.kind, draft.width or draft.dst.width, dst, inputs[0],
                residual if draft.kind == "linear" else inputs[1], inputs[2],
                matrix(draft) if draft.weight is not None else -1,
                draft.groups, draft.index, draft.act, draft.by, draft.scale, vector(draft.vector),
            )
        )  # fmt: skip
        placing.done(i, draft)
    ropes = [RopeTable(vector(f), int(f.size), factor) for f, factor in drafting.ropes]
    layers = []
    for i, cache in enumerate(drafting.decoder.layers):
        scale, softcap, sinks = drafting.layers[i]
        layers.append(
            AttentionLayer(
                cache.q_heads, cache.kv_heads, cache.head_dim, cache.value_dim, cache.sliding_window, scale, softcap,
                vector(sinks),
            )
        )  # fmt: skip
    return Program(
        tuple(ops), tuple(matrices), tuple(ropes), tuple(layers), tuple(placing.buffers), precision.cache,
        placing.output, packing.align(file), drafting.sparsity.to_string(),
    )  # fmt: skip
