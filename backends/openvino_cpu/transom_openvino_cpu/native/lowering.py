"""From a drafted decoder to a program: a buffer for each value, and the weights in one file."""

from __future__ import annotations

from collections.abc import Callable
from typing import BinaryIO

import numpy as np

from transom.graph.weights import Array, Dense
from transom.programs import fusing
from transom.programs.buffers import BufferAllocator
from transom.programs.reading import GraphReader, Op, Value
from transom.programs.written import NOWHERE, AttentionLayer, RopeTable, View
from transom_openvino_cpu.native import packing
from transom_openvino_cpu.native.packing import TILE
from transom_openvino_cpu.native.program import NativeOp, NativeProgram
from transom_openvino_cpu.precision import CpuPrecision

BARRIERS = ("attend", "rows")
"""Operators that look at other tokens than their own."""


def fuse(reader: GraphReader) -> list[Op]:
    """The same program in fewer operators: residuals and biases inside products, products of one input together,
    gates and rotations without a copy."""
    drafts = fusing.fuse_scales(list(reader.ops))
    drafts = fusing.fuse_biases(drafts)
    drafts = fusing.fuse_gates(drafts, TILE)
    drafts = fusing.fuse_residuals(drafts)
    drafts = fusing.fuse_same_input(drafts, TILE)
    return fusing.in_place(drafts, reader.logits)


def write(
    reader: GraphReader, precision: CpuPrecision, file: BinaryIO, progress: Callable[[float], None]
) -> NativeProgram:
    """The finished program, its weights in `file`."""
    drafts = fuse(reader)
    placing = BufferAllocator(drafts, reader.logits, BARRIERS)
    matrices: list[packing.NativeMatrix] = []
    known: dict[tuple[int, str], int] = {}
    vectors: dict[bytes, int] = {}

    def vector(array: Array | None) -> int:
        if array is None:
            return -1
        key = np.asarray(array, np.float32).tobytes()
        if key not in vectors:
            vectors[key] = packing.write_vector(file, array)
        return vectors[key]

    def matrix(op: Op) -> int:
        assert op.weight is not None
        # A table that is read both as an embedding and as the vocabulary matrix lies in the file once.
        key = (op.key or -id(op), op.by if op.by != "f32" else "")
        if key not in known:
            known[key] = len(matrices)
            to_int8 = op.by == "int8" and isinstance(op.weight, Dense)
            matrices.append(packing.write_matrix(file, op.weight, narrow=op.by == "bf16", to_int8=to_int8))
        return known[key]

    def view(value: Value) -> View:
        return placing.place(value)

    ops: list[NativeOp] = []
    for i, op in enumerate(drafts):
        progress(i / len(drafts))
        inputs = [view(v) for v in op.inputs] + [NOWHERE] * 3
        residual = NOWHERE if op.residual is None else view(op.residual)
        dst = view(op.dst)
        ops.append(
            NativeOp(
                op.kind, op.width or op.dst.width, dst, inputs[0],
                residual if op.kind == "linear" else inputs[1], inputs[2],
                matrix(op) if op.weight is not None else -1,
                op.groups, op.index, op.act, op.by, op.scale, vector(op.vector),
            )
        )  # fmt: skip
        placing.done(i, op)
    ropes = [RopeTable(vector(f), int(f.size), factor) for f, factor in reader.ropes]
    layers = []
    for i, cache in enumerate(reader.decoder.layers):
        scale, softcap, sinks = reader.layers[i]
        layers.append(
            AttentionLayer(
                cache.q_heads, cache.kv_heads, cache.head_dim, cache.value_dim, cache.sliding_window, scale, softcap,
                vector(sinks),
            )
        )  # fmt: skip
    return NativeProgram(
        tuple(ops), tuple(matrices), tuple(ropes), tuple(layers), tuple(placing.buffers), precision.cache,
        placing.output, packing.align(file), reader.sparsity.to_string(),
    )  # fmt: skip
