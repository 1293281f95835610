"""Lowers a decoder to a native program: assigns buffers, and writes the weights into one file."""

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
from transom_openvino_cpu.native.layout import TILE, NativeMatrix
from transom_openvino_cpu.native.program import NativeOp, NativeProgram
from transom_openvino_cpu.precision import CpuPrecision

BARRIERS = ("attend", "rows")
"""Operators that read the rows of other tokens."""


def fuse(reader: GraphReader) -> list[Op]:
    """Fuse operators: residuals and biases into products, products of one input together, gates and rotations in
    place."""
    ops = fusing.fuse_scales(list(reader.ops))
    ops = fusing.fuse_biases(ops)
    ops = fusing.fuse_gates(ops, TILE)
    ops = fusing.fuse_residuals(ops)
    ops = fusing.fuse_same_input(ops, TILE)
    return fusing.in_place(ops, reader.logits)


def write(
    reader: GraphReader, precision: CpuPrecision, file: BinaryIO, progress: Callable[[float], None]
) -> NativeProgram:
    """The program; its weights are written to `file`."""
    fused = fuse(reader)
    buffers = BufferAllocator(fused, reader.logits, BARRIERS)
    matrices: list[NativeMatrix] = []
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
        # A table that is both the embedding and the vocabulary matrix is stored once.
        key = (op.key or -id(op), op.by if op.by != "f32" else "")
        if key not in known:
            known[key] = len(matrices)
            to_int8 = op.by == "int8" and isinstance(op.weight, Dense)
            matrices.append(packing.write_matrix(file, op.weight, narrow=op.by == "bf16", to_int8=to_int8))
        return known[key]

    def view(value: Value) -> View:
        return buffers.place(value)

    ops: list[NativeOp] = []
    for i, op in enumerate(fused):
        progress(i / len(fused))
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
        buffers.done(i, op)
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
        tuple(ops), tuple(matrices), tuple(ropes), tuple(layers), tuple(buffers.buffers), precision.cache,
        buffers.output, packing.align(file), reader.sparsity.to_string(),
    )  # fmt: skip
