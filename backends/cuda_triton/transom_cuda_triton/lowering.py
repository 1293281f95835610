"""Lowers a decoder to a program of this backend's operators, and writes the weights into one file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import BinaryIO

import numpy as np

from transom.graph.weights import Array, Weight
from transom.programs import fusing
from transom.programs.buffers import BufferAllocator
from transom.programs.reading import GraphReader, Op, Value
from transom.programs.written import NOWHERE, AttentionLayer, RopeTable, View
from transom.sparsity import Sparsity
from transom_cuda_triton import packing
from transom_cuda_triton.precision import QuantizedType, TritonPrecision
from transom_cuda_triton.program import TritonOp, TritonProgram

TILE = 16
"""Columns; views of a buffer start at multiples of this, so that every load is aligned."""


class TritonKernels:
    """What this backend's kernels support: see `transom.programs.reading.Kernels`."""

    tile = TILE
    largest_head = 256
    largest_group = 64
    interleaved = True
    float8 = False

    def __init__(self, precision: TritonPrecision) -> None:
        self._precision = precision

    def matrix(self, weight: Weight) -> str:
        return packing.packable(weight)

    def by(self, weight: Weight, *, head: bool) -> QuantizedType:
        """The type that a plain matrix is quantized to, `"int8"` or `"fp8"`, or `""`; never the vocabulary matrix."""
        quantized = self._precision.quantized
        return quantized if packing.quantizable(weight, quantized) and not head else ""

    def policy(self, policy: Sparsity) -> str:
        return unsupported(policy)


def unsupported(policy: Sparsity) -> str:
    """Why the routing kernels cannot apply this policy; empty if they can."""
    if policy.dense:
        return ""
    if policy.score != "rms" or policy.node != 8:
        given = f"{policy.node} with {policy.score!r}"
        return f"the routing kernels need nodes of 8 tokens with the score 'rms', not of {given}"
    if policy.unit not in (16, 32, 64):
        return f"the routing kernels select units of 16, 32 or 64 tokens, not of {policy.unit}"
    if policy.columns > 64:
        return f"the routing kernels have at most 64 columns, not {policy.columns}"
    if policy.rows > 16:
        return f"the routing kernels sample at most 16 rows of a block, not {policy.rows}"
    return ""


def fuse(reader: GraphReader) -> list[Op]:
    """Fuse operators: scales into the embedding, biases into products, products of one input together; write in place
    where possible."""
    ops = fusing.fuse_scales(list(reader.ops))
    ops = fusing.fuse_biases(ops)
    ops = fusing.fuse_same_input(ops, TILE)
    ops = fusing.in_place(_keys_unrotated(ops), reader.logits)
    for op in ops:
        if op.kind == "reduce":  # over the cards, in place
            op.dst.parent, op.dst.offset = op.inputs[0], 0
    return _sums_before_norms(ops)


def _keys_unrotated(ops: list[Op]) -> list[Op]:
    """Move rotations of keys into the kernel that writes them to the cache: the rope becomes `rope` of `attend`."""
    makers, readers = fusing.makers_of(ops), fusing.readers_of(ops)
    done: set[int] = set()
    for op in ops:
        if op.kind != "attend":
            continue
        rope = makers.get(id(op.inputs[1]))
        if rope is not None and rope.kind == "rope" and len(readers[id(rope.dst)]) == 1:
            op.inputs[1] = rope.inputs[0]
            op.rope, op.interleaved = rope.index, rope.interleaved
            done.add(id(rope))
    return [d for d in ops if id(d) not in done]


def _sums_before_norms(ops: list[Op]) -> list[Op]:
    """Fuse norm(a + b), with a sum that is read later, into one operator that writes the sum over b."""
    readers = fusing.readers_of(ops)
    place = {id(d): i for i, d in enumerate(ops)}
    done: set[int] = set()
    for i, op in enumerate(ops):
        following = ops[i + 1] if i + 1 < len(ops) else None
        if op.kind != "add" or following is None or following.kind != "norm":
            continue
        if following.inputs[0] is not op.dst or following.dst.parent is not None or following.groups != 1:
            continue
        for x, residual in (op.inputs, op.inputs[::-1]):
            later = [d for d in readers[id(residual)] if place[id(d)] > i]
            if not later and residual.parent is None and x.root()[0] is not residual and op.dst.parent is None:
                op.dst.parent, op.dst.offset = residual, 0
                following.inputs, following.residual = [x], op.dst
                done.add(id(op))
                break
    return [d for d in ops if id(d) not in done]


def write(
    reader: GraphReader, precision: TritonPrecision, file: BinaryIO, progress: Callable[[float], None]
) -> TritonProgram:
    """The program; its weights are written to `file`.

    Raises:
        OptionError: a weight is too large for float16.
    """
    return _ProgramWriter(reader, precision, file).program(progress)


class _ProgramWriter:
    def __init__(self, reader: GraphReader, precision: TritonPrecision, file: BinaryIO) -> None:
        self._reader, self._number, self._quantized, self._file = reader, precision.number, precision.quantized, file
        self._fused = fuse(reader)
        self._buffers = BufferAllocator(self._fused, reader.logits)
        self._matrices: list[packing.TritonMatrix] = []
        self._known: dict[tuple[int, str], int] = {}
        self._vectors: dict[bytes, int] = {}
        self._ops: list[TritonOp] = []

    def program(self, progress: Callable[[float], None]) -> TritonProgram:
        reader, late = self._reader, False
        for i, op in enumerate(self._fused):
            progress(i / len(self._fused))
            late = late or op.kind == "rows"
            self._write(op, late)
            self._buffers.done(i, op)
        ropes = tuple(RopeTable(self._vector(f), int(f.size), factor) for f, factor in reader.ropes)
        layers = []
        for i, cache in enumerate(reader.decoder.layers):
            scale, softcap, sinks = reader.layers[i]
            layers.append(
                AttentionLayer(
                    cache.q_heads, cache.kv_heads, cache.head_dim, cache.value_dim, cache.sliding_window, scale,
                    softcap, self._vector(sinks),
                )
            )  # fmt: skip
        widths = tuple(b.width for b in self._buffers.buffers)
        return TritonProgram(
            self._number, tuple(self._ops), tuple(self._matrices), ropes, tuple(layers), widths, self._buffers.output,
            reader.decoder.vocabulary, packing.align(self._file), reader.sparsity.to_string(),
        )  # fmt: skip

    def _write(self, op: Op, late: bool) -> None:
        a, b, c = ([self._view(v) for v in op.inputs] + [NOWHERE] * 3)[:3]
        dst, width = self._view(op.dst), op.dst.width
        kind = op.kind
        if kind == "embed":
            written = TritonOp("embed", width, dst, matrix=self._matrix(op), scale=op.scale)
        elif kind == "norm":
            residual = NOWHERE if op.residual is None else self._view(op.residual)
            gain = self._vector(op.vector)
            written = TritonOp("norm", width, dst, a, residual, vector=gain, groups=op.groups, scale=op.scale)
        elif kind == "linear":
            written = TritonOp("linear", width, dst, a, matrix=self._matrix(op))
            if op.vector is not None:
                self._ops.append(replace(written, late=late))
                written = TritonOp("combine", width, dst, dst, vector=self._vector(op.vector))
        elif kind in ("add", "bias", "scale", "softcap"):
            factor, cap = (op.scale, 0.0) if kind == "scale" else (1.0, op.scale if kind == "softcap" else 0.0)
            written = TritonOp("combine", width, dst, a, b, vector=self._vector(op.vector), scale=factor, cap=cap)
        elif kind == "glu":
            written = TritonOp("gate", width, dst, a, b, act=op.act)
        elif kind == "rope":
            written = TritonOp("rotate", width, dst, a, groups=op.groups, index=op.index, interleaved=op.interleaved)
        elif kind == "attend":
            written = TritonOp("attend", width, dst, a, b, c, index=op.index, rope=op.rope, interleaved=op.interleaved)
        else:
            written = TritonOp("reduce" if kind == "reduce" else "rows", width, dst, a)
        self._ops.append(replace(written, late=late))

    def _view(self, value: Value) -> View:
        return self._buffers.place(value)

    def _vector(self, array: Array | None) -> int:
        if array is None:
            return -1
        flat = np.ascontiguousarray(array, np.float32)
        if flat.tobytes() not in self._vectors:
            self._vectors[flat.tobytes()] = packing.write_array(self._file, flat)
        return self._vectors[flat.tobytes()]

    def _matrix(self, op: Op) -> int:
        assert op.weight is not None
        # A table that is both the embedding and the vocabulary matrix is stored once.
        key = (op.key or -id(op), op.by)
        if key not in self._known:
            self._known[key] = len(self._matrices)
            name = f"the {op.kind} matrix of {op.weight.shape[0]} rows"
            quantized = self._quantized if op.by == self._quantized else ""
            packed = packing.write_matrix(self._file, op.weight, self._number, quantized=quantized, name=name)
            self._matrices.append(packed)
        return self._known[key]
