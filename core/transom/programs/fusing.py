"""Passes that fuse operators: the same program in fewer operators, with less memory traffic."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from transom.graph.weights import concat_rows, take_rows
from transom.programs.reading import Op, Value


def readers_of(ops: Sequence[Op]) -> dict[int, list[Op]]:
    found: dict[int, list[Op]] = {}
    for op in ops:
        for value in op.reads():
            found.setdefault(id(value), []).append(op)
    return found


def makers_of(ops: Sequence[Op]) -> dict[int, Op]:
    return {id(d.dst): d for d in ops}


def fuse_scales(ops: list[Op]) -> list[Op]:
    makers, readers = makers_of(ops), readers_of(ops)
    done: set[int] = set()
    for op in ops:
        source = makers.get(id(op.inputs[0])) if op.kind == "scale" else None
        if source is not None and source.kind == "embed" and len(readers[id(source.dst)]) == 1:
            source.scale, source.dst = source.scale * op.scale, op.dst
            done.add(id(op))
    return [d for d in ops if id(d) not in done]


def fuse_biases(ops: list[Op]) -> list[Op]:
    makers, readers = makers_of(ops), readers_of(ops)
    done: set[int] = set()
    for op in ops:
        source = makers.get(id(op.inputs[0])) if op.kind == "bias" else None
        if source is not None and source.kind == "linear" and len(readers[id(source.dst)]) == 1:
            source.vector, source.dst = op.vector, op.dst
            done.add(id(op))
    return [d for d in ops if id(d) not in done]


def fuse_gates(ops: list[Op], tile: int) -> list[Op]:
    """Fuses act(gate(x)) * up(x) into one product whose matrix alternates `tile` rows of gate and `tile` rows of up."""
    makers, readers = makers_of(ops), readers_of(ops)
    done: set[int] = set()
    for i, op in enumerate(ops):
        if op.kind != "glu":
            continue
        gate, up = (makers.get(id(v)) for v in op.inputs)
        if gate is None or up is None or gate is up or gate.kind != "linear" or up.kind != "linear":
            continue
        alone = all(len(readers[id(d.dst)]) == 1 and d.vector is None and d.residual is None for d in (gate, up))
        if not alone or gate.inputs[0] is not up.inputs[0] or gate.by != up.by or gate.dst.width % tile:
            continue
        assert gate.weight is not None
        assert up.weight is not None
        both = concat_rows([gate.weight, up.weight])
        if both is None or gate.weight.shape != up.weight.shape:
            continue
        rows = np.arange(2 * gate.dst.width).reshape(2, -1, tile).swapaxes(0, 1).reshape(-1)
        ops[i] = Op(
            "linear", op.dst, [gate.inputs[0]], weight=take_rows(both, rows), width=op.dst.width, act=op.act,
            by=gate.by,
        )  # fmt: skip
        done |= {id(gate), id(up)}
    return [d for d in ops if id(d) not in done]


def fuse_residuals(ops: list[Op]) -> list[Op]:
    makers, readers = makers_of(ops), readers_of(ops)
    order = {id(d.dst): i for i, d in enumerate(ops)}
    done: set[int] = set()
    for op in ops:
        if op.kind != "add":
            continue
        for product, other in (op.inputs, op.inputs[::-1]):
            source = makers.get(id(product))
            fits = source is not None and source.kind == "linear" and not source.act and source.residual is None
            if not fits or source is None or len(readers[id(product)]) != 1:
                continue
            if order.get(id(other), -1) < order[id(product)] and other is not product:
                source.residual, source.dst = other, op.dst
                order[id(op.dst)] = order[id(product)]
                makers[id(op.dst)] = source
                done.add(id(op))
                break
    return [d for d in ops if id(d) not in done]


def fuse_same_input(ops: list[Op], tile: int) -> list[Op]:
    """Fuses products of the same input into one, placed where the first was; each keeps its columns of the result. Only
    products with a multiple of `tile` output columns are fused."""
    groups: dict[tuple[int, str], list[Op]] = {}
    for op in ops:
        if op.kind == "linear" and not op.act and op.residual is None and op.dst.width % tile == 0:
            groups.setdefault((id(op.inputs[0]), op.by), []).append(op)
    done: set[int] = set()
    instead: dict[int, Op] = {}
    for members in groups.values():
        weights = [d.weight for d in members if d.weight is not None]
        joined = concat_rows(weights) if len(members) > 1 else None
        if joined is None or len({d.vector is None for d in members}) > 1:
            continue
        whole = Value(joined.shape[0])
        vectors = [d.vector for d in members if d.vector is not None]
        vector = np.concatenate(vectors) if vectors else None
        at = 0
        for member in members:
            member.dst.parent, member.dst.offset = whole, at
            at += member.dst.width
        first = members[0]
        instead[id(first)] = Op("linear", whole, first.inputs, weight=joined, vector=vector, width=at, by=first.by)
        done |= {id(d) for d in members[1:]}
    return [instead.get(id(d), d) for d in ops if id(d) not in done]


def in_place(ops: list[Op], logits: Value) -> list[Op]:
    """Lets operators that are the only reader of their input overwrite it. Rotations always do, on a copy if needed."""
    out: list[Op] = []
    readers = readers_of(ops)
    for op in ops:
        if op.kind in ("rope", "norm", "softcap", "scale", "bias"):
            x = op.inputs[0]
            alone = len(readers[id(x)]) == 1
            if op.kind == "rope" and not alone:
                copy = Value(x.width)
                out.append(Op("scale", copy, [x], width=x.width))
                op.inputs[0] = x = copy
                alone = True
            wanted = op.kind == "rope" or x.root()[0] is not x or op.dst is logits
            if alone and wanted and op.dst.parent is None and op.dst is not x:
                op.dst.parent, op.dst.offset = x, 0
        out.append(op)
    return out
