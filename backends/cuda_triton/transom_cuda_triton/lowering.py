"""From a drafted decoder to a program of this backend's operators, and the weights in one file."""

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
from transom_cuda_triton.precision import TritonPrecision
from transom_cuda_triton.program import TritonOp, TritonProgram

TILE = 16
"""Columns: views of a buffer begin at a multiple of it, so that every load is aligned."""


class TritonKernels:
    """What this backend has kernels for: see `transom.programs.Kernels`."""

    tile = TILE
    largest_head = 256
    largest_group = 64
    neighbours = True
    float8 = False

    def __init__(self, precision: TritonPrecision) -> None:
        self._precision = precision

    def matrix(self, weight: Weight) -> str:
        return packing.packable(weight)

    def by(self, weight: Weight, *, head: bool) -> str:
        """What a plain matrix is rounded to, `"int8"` or `"fp8"`, else `""`. The vocabulary matrix never is."""
        rounded = self._precision.rounded
        return rounded if packing.roundable(weight, rounded) and not head else ""

    def policy(self, policy: Sparsity) -> str:
        return unsupported(policy)


def unsupported(policy: Sparsity) -> str:
    """Why the routing kernels cannot choose by this policy; empty if they can."""
    if policy.dense:
        return ""
    if policy.score != "rms" or policy.node != 8:
        asked = f"{policy.node} by {policy.score!r}"
        return f"the routing kernels have nodes of 8 tokens by the score 'rms', not of {asked}"
    if policy.unit not in (16, 32, 64):
        return f"the routing kernels choose units of 16, 32 or 64 tokens, not of {policy.unit}"
    if policy.columns > 64:
        return f"the routing kernels have at most 64 columns, not {policy.columns}"
    if policy.rows > 16:
        return f"the routing kernels look at no more than 16 rows of a block, not at {policy.rows}"
    return ""


def fuse(reader: GraphReader) -> list[Op]:
    """The same program in fewer operators: scales in the embedding, biases after products, products of one input
    together, what can be written in place in place."""
    ops = fusing.fuse_scales(list(reader.ops))
    ops = fusing.fuse_biases(ops)
    ops = fusing.fuse_same_input(ops, TILE)
    ops = fusing.in_place(_keys_unrotated(ops), reader.logits)
    for draft in ops:
        if draft.kind == "reduce":  # over the cards, in place
            draft.dst.parent, draft.dst.offset = draft.inputs[0], 0
    return _sums_before_norms(ops)


def _keys_unrotated(ops: list[Op]) -> list[Op]:
    """Rotations of keys are left to the kernel that writes them to the cache: `attend` has their rope as `rope`."""
    makers, readers = fusing.makers_of(ops), fusing.readers_of(ops)
    done: set[int] = set()
    for draft in ops:
        if draft.kind != "attend":
            continue
        rope = makers.get(id(draft.inputs[1]))
        if rope is not None and rope.kind == "rope" and len(readers[id(rope.dst)]) == 1:
            draft.inputs[1] = rope.inputs[0]
            draft.rope, draft.neighbours = rope.index, rope.neighbours
            done.add(id(rope))
    return [d for d in ops if id(d) not in done]


def _sums_before_norms(ops: list[Op]) -> list[Op]:
    """norm(a + b), where the sum is read later, too: one operator, which writes the sum over b."""
    readers = fusing.readers_of(ops)
    place = {id(d): i for i, d in enumerate(ops)}
    done: set[int] = set()
    for i, draft in enumerate(ops):
        following = ops[i + 1] if i + 1 < len(ops) else None
        if draft.kind != "add" or following is None or following.kind != "norm":
            continue
        if following.inputs[0] is not draft.dst or following.dst.parent is not None or following.groups != 1:
            continue
        for x, residual in (draft.inputs, draft.inputs[::-1]):
            later = [d for d in readers[id(residual)] if place[id(d)] > i]
            if not later and residual.parent is None and x.root()[0] is not residual and draft.dst.parent is None:
                draft.dst.parent, draft.dst.offset = residual, 0
                following.inputs, following.residual = [x], draft.dst
                done.add(id(draft))
                break
    return [d for d in ops if id(d) not in done]


def write(
    reader: GraphReader, precision: TritonPrecision, file: BinaryIO, progress: Callable[[float], None]
) -> TritonProgram:
    """The finished program, its weights in `file`.

    Raises:
        OptionError: a weight is too large for float16.
    """
    return _Writing(reader, precision, file).program(progress)


class _Writing:
    def __init__(self, reader: GraphReader, precision: TritonPrecision, file: BinaryIO) -> None:
        self._drafting, self._number, self._rounded, self._file = reader, precision.number, precision.rounded, file
        self._drafts = fuse(reader)
        self._placing = BufferAllocator(self._drafts, reader.logits)
        self._matrices: list[packing.TritonMatrix] = []
        self._known: dict[tuple[int, str], int] = {}
        self._vectors: dict[bytes, int] = {}
        self._ops: list[TritonOp] = []

    def program(self, progress: Callable[[float], None]) -> TritonProgram:
        reader, late = self._drafting, False
        for i, draft in enumerate(self._drafts):
            progress(i / len(self._drafts))
            late = late or draft.kind == "rows"
            self._write(draft, late)
            self._placing.done(i, draft)
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
        widths = tuple(b.width for b in self._placing.buffers)
        return TritonProgram(
            self._number, tuple(self._ops), tuple(self._matrices), ropes, tuple(layers), widths, self._placing.output,
            reader.decoder.vocabulary, packing.align(self._file), reader.sparsity.to_string(),
        )  # fmt: skip

    def _write(self, draft: Op, late: bool) -> None:
        a, b, c = ([self._view(v) for v in draft.inputs] + [NOWHERE] * 3)[:3]
        dst, width = self._view(draft.dst), draft.dst.width
        kind = draft.kind
        if kind == "embed":
            op = TritonOp("embed", width, dst, matrix=self._matrix(draft), scale=draft.scale)
        elif kind == "norm":
            residual = NOWHERE if draft.residual is None else self._view(draft.residual)
            gain = self._vector(draft.vector)
            op = TritonOp("norm", width, dst, a, residual, vector=gain, groups=draft.groups, scale=draft.scale)
        elif kind == "linear":
            op = TritonOp("linear", width, dst, a, matrix=self._matrix(draft))
            if draft.vector is not None:
                self._ops.append(replace(op, late=late))
                op = TritonOp("combine", width, dst, dst, vector=self._vector(draft.vector))
        elif kind in ("add", "bias", "scale", "softcap"):
            factor, cap = (draft.scale, 0.0) if kind == "scale" else (1.0, draft.scale if kind == "softcap" else 0.0)
            op = TritonOp("combine", width, dst, a, b, vector=self._vector(draft.vector), scale=factor, cap=cap)
        elif kind == "glu":
            op = TritonOp("gate", width, dst, a, b, act=draft.act)
        elif kind == "rope":
            op = TritonOp("rotate", width, dst, a, groups=draft.groups, index=draft.index, neighbours=draft.neighbours)
        elif kind == "attend":
            op = TritonOp(
                "attend", width, dst, a, b, c, index=draft.index, rope=draft.rope, neighbours=draft.neighbours
            )
        else:
            op = TritonOp("reduce" if kind == "reduce" else "rows", width, dst, a)
        self._ops.append(replace(op, late=late))

    def _view(self, value: Value) -> View:
        return self._placing.place(value)

    def _vector(self, array: Array | None) -> int:
        if array is None:
            return -1
        flat = np.ascontiguousarray(array, np.float32)
        if flat.tobytes() not in self._vectors:
            self._vectors[flat.tobytes()] = packing.write_array(self._file, flat)
        return self._vectors[flat.tobytes()]

    def _matrix(self, draft: Op) -> int:
        assert draft.weight is not None
        # A table that is read both as an embedding and as the vocabulary matrix lies in the file once.
        key = (draft.key or -id(draft), draft.by)
        if key not in self._known:
            self._known[key] = len(self._matrices)
            name = f"the {draft.kind} matrix of {draft.weight.shape[0]} rows"
            rounded = self._rounded if draft.by == self._rounded else ""
            packed = packing.write_matrix(self._file, draft.weight, self._number, rounded=rounded, name=name)
            self._matrices.append(packed)
        return self._known[key]
