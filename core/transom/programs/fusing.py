"""What can be made together: the same program in fewer operators, each of which reads and writes less memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from transom.graph.weights import concat_rows, take_rows
from transom.programs.drafting import Draft, Value


def readers_of(drafts: Sequence[Draft]) -> dict[int, list[Draft]]:
    found: dict[int, list[Draft]] = {}
    for draft in drafts:
        for value in draft.reads():
            found.setdefault(id(value), []).append(draft)
    return found


def makers_of(drafts: Sequence[Draft]) -> dict[int, Draft]:
    return {id(d.dst): d for d in drafts}


def fuse_scales(drafts: list[Draft]) -> list[Draft]:
    makers, readers = makers_of(drafts), readers_of(drafts)
    done: set[int] = set()
    for draft in drafts:
        source = makers.get(id(draft.inputs[0])) if draft.kind == "scale" else None
        if source is not None and source.kind == "embed" and len(readers[id(source.dst)]) == 1:
            source.scale, source.dst = source.scale * draft.scale, draft.dst
            done.add(id(draft))
    return [d for d in drafts if id(d) not in done]


def fuse_biases(drafts: list[Draft]) -> list[Draft]:
    makers, readers = makers_of(drafts), readers_of(drafts)
    done: set[int] = set()
    for draft in drafts:
        source = makers.get(id(draft.inputs[0])) if draft.kind == "bias" else None
        if source is not None and source.kind == "linear" and len(readers[id(source.dst)]) == 1:
            source.vector, source.dst = draft.vector, draft.dst
            done.add(id(draft))
    return [d for d in drafts if id(d) not in done]


def fuse_gates(drafts: list[Draft], tile: int) -> list[Draft]:
    """act(gate(x)) * up(x): one product, whose rows come `tile` of one matrix and `tile` of the other in turn."""
    makers, readers = makers_of(drafts), readers_of(drafts)
    done: set[int] = set()
    for i, draft in enumerate(drafts):
        if draft.kind != "glu":
            continue
        gate, up = (makers.get(id(v)) for v in draft.inputs)
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
        drafts[i] = Draft(
            "linear", draft.dst, [gate.inputs[0]], weight=take_rows(both, rows), width=draft.dst.width, act=draft.act,
            by=gate.by,
        )  # fmt: skip
        done |= {id(gate), id(up)}
    return [d for d in drafts if id(d) not in done]


def fuse_residuals(drafts: list[Draft]) -> list[Draft]:
    makers, readers = makers_of(drafts), readers_of(drafts)
    order = {id(d.dst): i for i, d in enumerate(drafts)}
    done: set[int] = set()
    for draft in drafts:
        if draft.kind != "add":
            continue
        for product, other in (draft.inputs, draft.inputs[::-1]):
            source = makers.get(id(product))
            fits = source is not None and source.kind == "linear" and not source.act and source.residual is None
            if not fits or source is None or len(readers[id(product)]) != 1:
                continue
            if order.get(id(other), -1) < order[id(product)] and other is not product:
                source.residual, source.dst = other, draft.dst
                order[id(draft.dst)] = order[id(product)]
                makers[id(draft.dst)] = source
                done.add(id(draft))
                break
    return [d for d in drafts if id(d) not in done]


def fuse_same_input(drafts: list[Draft], tile: int) -> list[Draft]:
    """Products of one input as one product, whose columns they share: it is made where the first of them was. Only of
    products whose columns are a multiple of `tile`."""
    groups: dict[tuple[int, str], list[Draft]] = {}
    for draft in drafts:
        if draft.kind == "linear" and not draft.act and draft.residual is None and draft.dst.width % tile == 0:
            groups.setdefault((id(draft.inputs[0]), draft.by), []).append(draft)
    done: set[int] = set()
    instead: dict[int, Draft] = {}
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
        instead[id(first)] = Draft("linear", whole, first.inputs, weight=joined, vector=vector, width=at, by=first.by)
        done |= {id(d) for d in members[1:]}
    return [instead.get(id(d), d) for d in drafts if id(d) not in done]


def in_place(drafts: list[Draft], logits: Value) -> list[Draft]:
    """Rotations always, other operators on rows where nobody else reads their input, write over it."""
    out: list[Draft] = []
    readers = readers_of(drafts)
    for draft in drafts:
        if draft.kind in ("rope", "norm", "softcap", "scale", "bias"):
            x = draft.inputs[0]
            alone = len(readers[id(x)]) == 1
            if draft.kind == "rope" and not alone:
                copy = Value(x.width)
                out.append(Draft("scale", copy, [x], width=x.width))
                draft.inputs[0] = x = copy
                alone = True
            wanted = draft.kind == "rope" or x.root()[0] is not x or draft.dst is logits
            if alone and wanted and draft.dst.parent is None and draft.dst is not x:
                draft.dst.parent, draft.dst.offset = x, 0
        out.append(draft)
    return out
