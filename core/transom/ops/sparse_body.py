"""A sparse `transom::CachedAttention` in standard ONNX operators, for engines without a kernel for it.

It makes the same choice as `sparse_routing`, with masks: correct for any ragged batch, at more than the cost of dense
attention. The keys of all sequences are arranged by sequence and position in one grid of S × P places, where P is the
longest sequence rounded up to whole blocks, so that nodes and units are rows of a reshape. Shapes in the comments: K KV
heads, G query heads per KV head, T new tokens, M = S · P places of the grid, N nodes, U units, D columns of a key head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from transom.ops.schema import Attributes
from transom.ops.sparse_routing import (
    BLOCK,
    COLUMN_ROWS,
    DENSE_ABOVE,
    VARIANCE_CAP,
    VARIANCE_WEIGHT,
    policy_of,
)

if TYPE_CHECKING:
    import onnx_ir as ir

    from transom.ops.functions import FunctionWriter
    from transom.sparsity import LayerSparsity, Sparsity

FAR = 2**30
"""Above every position, and exact in int32 and float32, to which engines may convert integers."""


def attend(f: FunctionWriter, attributes: Attributes, present: Sequence[bool]) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Write the operator into a function with the operator's inputs; returns its three outputs.

    Raises:
        ValueError: the policy cannot be applied to a call with these attributes and inputs.
    """
    policy = policy_of(present, attributes)
    assert policy.rule is not None
    has_sinks = len(present) > 10 and present[10]
    return _BodyWriter(f, attributes, policy, f.inputs[10] if has_sinks else None).write()


@dataclass
class _Tokens:
    """Facts about each new token that the choice needs; int64 [T, 1] unless stated otherwise."""

    position: ir.Value
    sequence: ir.Value
    fresh: ir.Value
    """bool [T, T]: whether two new tokens belong to the same sequence."""
    count: ir.Value
    """Number of new tokens of its sequence."""
    number: ir.Value
    """Its index among the new tokens of its sequence."""
    far_end: ir.Value
    """Position at which the local window of its block begins."""
    together: ir.Value
    """bool [T, T]: whether two new tokens belong to the same query block."""
    begin: ir.Value
    """First position of its query block."""
    end: ir.Value
    """Last position of its query block."""


@dataclass
class _Grid:
    """The places of the grid; [1, M] unless stated otherwise."""

    places: ir.Value
    """int64 [M]: 0 … M - 1."""
    length: ir.Value
    """int64: P, the places of each sequence."""
    position: ir.Value
    sequence: ir.Value
    occupied: ir.Value
    """float32 [1, M]: 1 where the place holds a key."""
    keys: ir.Value
    """float32 [K, M, D]."""
    values: ir.Value


class _BodyWriter:
    """Writes one function body."""

    def __init__(
        self, f: FunctionWriter, attributes: Attributes, policy: LayerSparsity, sinks: ir.Value | None
    ) -> None:
        assert policy.rule is not None
        self.f, self.attributes, self.policy, self.sinks = f, attributes, policy, sinks
        self.rule: Sparsity = policy.rule
        self.kv_heads = int(attributes["kv_num_heads"])
        self.group = int(attributes["q_num_heads"]) // self.kv_heads
        self.window = int(attributes["sliding_window"])

    def write(self) -> tuple[ir.Value, ir.Value, ir.Value]:
        f, i = self.f, self.f.ints
        q, k, v, past_k, past_v, seq, pos, past_seq, past_pos = f.inputs[:9]
        present_k, present_v = f("Concat", past_k, k, axis=0), f("Concat", past_v, v, axis=0)
        key_seq, key_pos = f("Concat", past_seq, seq, axis=0), f("Concat", past_pos, pos, axis=0)
        grid, order = self._grid(present_k, present_v, key_seq, key_pos)
        past = f("Shape", past_seq)
        fresh_order = f("Slice", order, past, f("Shape", order), i([0]))
        tokens = self._tokens(pos, fresh_order)

        split = f("Reshape", q, i([0, self.kv_heads, self.group, -1]))
        queries = f("Transpose", split, perm=[1, 2, 0, 3])  # [K, G, T, D]
        if self.attributes["scale"]:
            scale = f.floats(float(self.attributes["scale"]))
        else:
            dim = f("Cast", f("Gather", f("Shape", queries), i(3)), to=1)
            scale = f("Reciprocal", f("Sqrt", dim))
        queries = f("Mul", queries, scale)
        turned = f("Transpose", grid.keys, perm=[0, 2, 1])
        scores = self._capped(f("MatMul", queries, f("Unsqueeze", turned, i([1]))))  # [K, G, T, M]

        own = f("Equal", tokens.sequence, grid.sequence)
        seen = f("And", f("And", own, self._is(grid.occupied)), f("LessOrEqual", grid.position, tokens.position))
        seen = self._within(seen, grid.position, tokens.position)  # [T, M]
        scores = f("Where", seen, scores, f.floats(-np.inf))
        top = f("ReduceMax", scores, i([-1]), keepdims=1)
        sink = None
        if self.sinks is not None:
            sink = f("Reshape", self.sinks, i([self.kv_heads, self.group, 1, 1]))
            top = f("Max", top, sink)
        weights = f("Exp", f("Sub", scores, top))  # relative to the largest score of all
        sink_mass = None if sink is None else f("Exp", f("Sub", sink, top))

        columns = self._columns(tokens, grid, weights, sink_mass) if self.rule.columns else None  # [K, M]
        read = self._choice(tokens, grid, queries, top, weights, sink_mass, own, columns)  # bool [K, T, M]
        # recomputed: relative to the old maximum, exp of the scores that are read may underflow
        scores = f("Where", f("Unsqueeze", read, i([1])), scores, f.floats(-np.inf))
        top = f("ReduceMax", scores, i([-1]), keepdims=1)
        if sink is not None:
            top = f("Max", top, sink)
        kept = f("Exp", f("Sub", scores, top))
        total = f("ReduceSum", kept, i([-1]), keepdims=1)
        if sink is not None:
            total = f("Add", total, f("Exp", f("Sub", sink, top)))
        heads = f("MatMul", f("Div", kept, total), f("Unsqueeze", grid.values, i([1])))  # [K, G, T, value_dim]
        out = f("Reshape", f("Transpose", heads, perm=[2, 0, 1, 3]), i([0, -1]))
        return out, present_k, present_v

    # helpers ----------------------------------------------------------------------------------------------------------
    def _capped(self, logits: ir.Value) -> ir.Value:
        if cap := float(self.attributes["softcap"]):
            return self.f("Mul", self.f("Tanh", self.f("Div", logits, self.f.floats(cap))), self.f.floats(cap))
        return logits

    def _is(self, number: ir.Value) -> ir.Value:
        return self.f("Greater", number, self.f.floats(0.0))

    def _float(self, value: ir.Value) -> ir.Value:
        return self.f("Cast", value, to=1)

    def _int(self, value: ir.Value) -> ir.Value:
        return self.f("Cast", value, to=7)

    def _plus(self, mass: ir.Value, more: ir.Value | None) -> ir.Value:
        return mass if more is None else self.f("Add", mass, more)

    def _within(self, mask: ir.Value, key: ir.Value, query: ir.Value) -> ir.Value:
        """`mask`, restricted to keys within the query's sliding window."""
        if not self.window:
            return mask
        near = self.f("Less", self.f("Sub", query, key), self.f.ints(self.window))
        return self.f("And", mask, near)

    def _first_seen(self, query: ir.Value) -> ir.Value:
        """The first position that a query sees."""
        if not self.window:
            return self.f.ints(0)
        return self.f("Max", self.f("Sub", query, self.f.ints(self.window - 1)), self.f.ints(0))

    def _block_start(self, position: ir.Value) -> ir.Value:
        """First position of the block that contains a position.

        Not computed as (position / 64) * 64: OpenVINO 2026.4 cancels the two, for integers too.
        """
        return self.f("Sub", position, self.f("Mod", position, self.f.ints(BLOCK)))

    def _count_up(self, end: ir.Value) -> ir.Value:
        """int64 0 … end - 1; `end` without a dimension."""
        return self.f("Range", self.f.ints(0), end, self.f.ints(1))

    # keys and tokens --------------------------------------------------------------------------------------------------
    def _grid(
        self, present_k: ir.Value, present_v: ir.Value, key_seq: ir.Value, key_pos: ir.Value
    ) -> tuple[_Grid, ir.Value]:
        """The grid of keys and values, and the sequence index of each key, int64 [keys]."""
        f, i = self.f, self.f.ints
        count = f("Gather", f("Shape", key_seq), i(0))
        index = self._count_up(count)
        same = f("Equal", f("Unsqueeze", key_seq, i([1])), f("Unsqueeze", key_seq, i([0])))
        first = f("ReduceMin", f("Where", same, f("Unsqueeze", index, i([0])), i(FAR)), i([1]), keepdims=0)
        opens = self._int(f("Equal", first, index))  # 1 for the first key of each sequence
        order = f("Gather", f("Sub", f("CumSum", opens, i(0)), i(1)), first)
        sequences = f("ReduceSum", opens, i([0]), keepdims=0)
        last = f("ReduceMax", key_pos, i([0]), keepdims=0)
        length = f("Add", self._block_start(last), i(BLOCK))
        size = f("Mul", sequences, length)
        slot = f("Unsqueeze", f("Add", f("Mul", order, length), key_pos), i([1]))
        one = f("Unsqueeze", size, i([0]))

        def laid_out(present: ir.Value) -> ir.Value:
            rows = f("Reshape", present, i([0, self.kv_heads, -1]))
            shape = f("Concat", one, f("Slice", f("Shape", rows), i([1]), i([3]), i([0])), axis=0)
            return f("Transpose", f("ScatterND", f("Expand", f.floats(0.0), shape), slot, rows), perm=[1, 0, 2])

        ones = f("Expand", f.floats(1.0), f("Unsqueeze", count, i([0])))
        occupied = f("ScatterND", f("Expand", f.floats(0.0), one), slot, ones)
        places = self._count_up(size)
        position, sequence, known = (
            f("Unsqueeze", x, i([0])) for x in (f("Mod", places, length), f("Div", places, length), occupied)
        )
        grid = _Grid(places, length, position, sequence, known, laid_out(present_k), laid_out(present_v))
        return grid, order

    def _tokens(self, pos: ir.Value, order: ir.Value) -> _Tokens:
        f, i = self.f, self.f.ints

        def row(x: ir.Value) -> ir.Value:
            return f("Unsqueeze", x, i([0]))

        position, sequence = f("Unsqueeze", pos, i([1])), f("Unsqueeze", order, i([1]))
        fresh = f("Equal", sequence, row(order))
        count = f("ReduceSum", self._int(fresh), i([1]), keepdims=1)
        first = f("ReduceMin", f("Where", fresh, row(pos), i(FAR)), i([1]), keepdims=1)
        block = self._block_start(position)
        local = -(-self.rule.local_window // BLOCK) * BLOCK
        far_end = f("Max", f("Sub", block, i(local)), i(0))
        prefill = f("GreaterOrEqual", count, i(COLUMN_ROWS))
        in_block = f("And", prefill, f("Equal", block, f("Transpose", block, perm=[1, 0])))
        itself = f("Equal", position, row(pos))
        together = f("And", fresh, f("Or", in_block, itself))
        begin = f("ReduceMin", f("Where", together, row(pos), i(FAR)), i([1]), keepdims=1)
        end = f("ReduceMax", f("Where", together, row(pos), i(-1)), i([1]), keepdims=1)
        return _Tokens(position, sequence, fresh, count, f("Sub", position, first), far_end, together, begin, end)

    # the choice -------------------------------------------------------------------------------------------------------
    def _columns(self, t: _Tokens, grid: _Grid, weights: ir.Value, sink_mass: ir.Value | None) -> ir.Value:
        """float32 [K, M]: 1 for the columns, the keys with the largest mass of each sequence."""
        f, i = self.f, self.f.ints
        # token r of T is one of the R rows where a multiple of T lies in (r + 1) R … (r + 2) R - 1
        rows = f("Min", t.count, i(COLUMN_ROWS))
        end = f("Sub", f("Mul", f("Add", t.number, i(2)), rows), i(1))
        multiple = f("Sub", end, f("Mod", end, t.count))
        sampled = f("GreaterOrEqual", multiple, f("Mul", f("Add", t.number, i(1)), rows))  # [T, 1]
        counts = self._float(f("And", sampled, f("Less", grid.position, t.far_end)))  # [T, M]
        total = self._plus(f("ReduceSum", weights, i([-1]), keepdims=1), sink_mass)
        mass = f("ReduceSum", f("Mul", f("Div", weights, total), counts), i([1, 2]), keepdims=0)  # [K, M]
        length = f("Unsqueeze", grid.length, i([0]))
        shape = f("Concat", i([self.kv_heads, -1]), length, axis=0)
        by_sequence = f("Reshape", mass, shape)  # [K, S, P]
        most = f("Min", length, i([self.rule.columns]))
        values, places = f.several(2, "TopK", by_sequence, most, axis=-1, largest=1, sorted=1)
        empty = f("Mul", by_sequence, f.floats(0.0))
        marked = f("ScatterElements", empty, places, self._float(self._is(values)), axis=2)
        return f("Reshape", marked, i([self.kv_heads, -1]))

    def _choice(
        self,
        t: _Tokens,
        grid: _Grid,
        queries: ir.Value,
        top: ir.Value,
        weights: ir.Value,
        sink_mass: ir.Value | None,
        own: ir.Value,
        columns: ir.Value | None,
    ) -> ir.Value:
        """bool [K, T, M]: the keys that each token reads, before causal mask and window."""
        f, i = self.f, self.f.ints
        rule = self.rule
        exact = rule.score == "rms"
        far = f("Less", grid.position, t.far_end)  # [T, M]
        near = f("Not", far)
        node_mass = self._node_masses(t, grid, queries, top, own, columns)  # [K, G, T, N]
        node_first = f("Slice", grid.position, i([0]), i([FAR]), i([1]), i([rule.node]))  # [1, N]
        node_far = f("Less", node_first, t.far_end)
        far_mass = f("Where", node_far, node_mass, f.floats(0.0))
        by_unit = f("Reshape", far_mass, i([0, 0, 0, -1, rule.unit // rule.node]))
        unit_mass = f("ReduceSum", by_unit, i([-1]), keepdims=0)  # [K, G, T, U]
        if exact:
            near_all = f("Where", near, weights, f.floats(0.0))
        else:
            near_all = f("Where", node_far, f.floats(0.0), node_mass)
        near_mass = f("ReduceSum", near_all, i([-1]), keepdims=1)  # [K, G, T, 1]
        total = f("Add", f("ReduceSum", unit_mass, i([-1]), keepdims=1), near_mass)
        column_mass = None
        if columns is not None:
            single = f("Mul", weights, f("Unsqueeze", columns, i([1, 2])))
            if exact:
                single = f("Where", far, single, f.floats(0.0))
            column_mass = f("ReduceSum", single, i([-1]), keepdims=1)
            total = f("Add", total, column_mass)
        total = self._plus(total, sink_mass)

        mixing = self._mixing(t)
        a = self._score(f("Div", unit_mass, total), mixing, root=exact)  # [K, T, U]
        covered = self._score(f("Div", near_mass, total), mixing, root=exact)  # [K, T, 1]
        if column_mass is not None:
            covered = f("Add", covered, self._score(f("Div", column_mass, total), mixing, root=False))
        sink_units = None
        if columns is None:
            unit_first = f("Slice", grid.position, i([0]), i([FAR]), i([1]), i([rule.unit]))  # [1, U]
            unit_own = f("Slice", own, i([0]), i([FAR]), i([1]), i([rule.unit]))  # [T, U]
            sink_units = f("And", unit_own, f("Less", unit_first, f("Min", t.far_end, i(BLOCK))))
            covered = f("Add", covered, f("ReduceSum", f("Mul", a, self._float(sink_units)), i([-1]), keepdims=1))
            a = f("Where", sink_units, f.floats(0.0), a)
        units = self._taken(t, a, covered)  # bool [K, T, U]
        if sink_units is not None:
            units = f("Or", units, sink_units)
        read = f("Gather", units, f("Div", grid.places, i(rule.unit)), axis=2)
        read = f("Or", read, near)
        if columns is not None:
            read = f("Or", read, self._is(f("Unsqueeze", columns, i([1]))))
        return self._or_dense(t, grid, own, read)

    def _node_masses(
        self,
        t: _Tokens,
        grid: _Grid,
        queries: ir.Value,
        top: ir.Value,
        own: ir.Value,
        columns: ir.Value | None,
    ) -> ir.Value:
        """float32 [K, G, T, N]: the estimated mass of each node that a token may read, relative to exp(top)."""
        f, i = self.f, self.f.ints
        rule = self.rule
        exact = rule.score == "rms"
        kept = grid.occupied if columns is None else f("Mul", grid.occupied, f("Sub", f.floats(1.0), columns))
        kept = f("Expand", kept, f("Slice", f("Shape", grid.keys), i([0]), i([2])))  # [K, M]
        count = f("ReduceSum", f("Reshape", kept, i([0, -1, rule.node])), i([-1]), keepdims=0)  # [K, N]
        least = f("Unsqueeze", f("Max", count, f.floats(1.0)), i([2]))
        dim = f("Slice", f("Shape", grid.keys), i([2]), i([3]))
        shape = f("Concat", i([0, -1, rule.node]), dim, axis=0)
        inside = f("Mul", grid.keys, f("Unsqueeze", kept, i([2])))  # [K, M, D]
        mean = f("Div", f("ReduceSum", f("Reshape", inside, shape), i([2]), keepdims=0), least)  # [K, N, D]

        def product(x: ir.Value, nodes: ir.Value) -> ir.Value:
            return f("MatMul", x, f("Unsqueeze", f("Transpose", nodes, perm=[0, 2, 1]), i([1])))

        logits = product(queries, mean)  # [K, G, T, N]
        if exact:
            squares = f("ReduceSum", f("Reshape", f("Mul", inside, grid.keys), shape), i([2]), keepdims=0)
            variance = f("Max", f("Sub", f("Div", squares, least), f("Mul", mean, mean)), f.floats(0.0))
            more = f("Mul", product(f("Mul", queries, queries), variance), f.floats(0.5 * VARIANCE_WEIGHT))
            logits = f("Add", logits, f("Min", more, f.floats(VARIANCE_CAP)))
        logits = self._capped(logits)
        first = f("Slice", grid.position, i([0]), i([FAR]), i([1]), i([rule.node]))  # [1, N]
        seen = f("Slice", own, i([0]), i([FAR]), i([1]), i([rule.node]))  # [T, N]
        seen = f("And", seen, f("Less", first, t.far_end) if exact else f("LessOrEqual", first, t.position))
        seen = self._within(seen, f("Add", first, i(rule.node - 1)), t.position)
        count = f("Unsqueeze", count, i([1, 2]))  # [K, 1, 1, N]
        seen = f("And", seen, self._is(count))
        relative = f("Where", seen, f("Sub", logits, top), f.floats(-np.inf))
        return f("Mul", count, f("Exp", relative))

    def _mixing(self, t: _Tokens) -> ir.Value:
        """float32 [T, T]: averages over the sampled rows of a token's query block."""
        f, i = self.f, self.f.ints
        stride = BLOCK // self.rule.rows
        number = f("Sub", t.position, t.begin)
        sampled = f("Equal", f("Mod", number, i(stride)), i(stride - 1))
        size = f("Add", f("Sub", t.end, t.begin), i(1))
        only = f("And", f("Less", size, i(stride)), f("Equal", t.position, t.end))
        rows = f("Transpose", f("Or", sampled, only), perm=[1, 0])  # [1, T]
        counted = self._float(f("And", t.together, rows))
        return f("Div", counted, f("ReduceSum", counted, i([1]), keepdims=1))

    def _score(self, shares: ir.Value, mixing: ir.Value, *, root: bool) -> ir.Value:
        """[K, G, T, x] to [K, T, x]: mean, or root mean square, over query heads and sampled rows."""
        f = self.f
        if root:
            shares = f("Mul", shares, shares)
        mean = f("MatMul", mixing, f("ReduceMean", shares, f.ints([1]), keepdims=0))
        return f("Sqrt", mean) if root else mean

    def _taken(self, t: _Tokens, a: ir.Value, covered: ir.Value) -> ir.Value:
        """bool [K, T, U]: the units before the local window that are chosen."""
        f, i = self.f, self.f.ints
        rule = self.rule
        count = f("Slice", f("Shape", a), i([2]), i([3]))
        values, places = f.several(2, "TopK", a, count, axis=-1, largest=1, sorted=1)
        rank = self._count_up(f("Squeeze", count, i([0])))
        if rule.top_k:
            take = f("Less", rank, i(rule.top_k))
        else:
            before = f("Add", covered, f("CumSum", values, i(-1), exclusive=1))
            total = f("Add", covered, f("ReduceSum", a, i([-1]), keepdims=1))
            shares = [self.policy.coverage(h) for h in range(self.kv_heads)]
            coverage = f("Reshape", f.floats(shares), i([-1, 1, 1]))
            take = f("Less", before, f("Mul", total, coverage))
            if rule.min_density > 0 or rule.max_density < 1:
                least, most = self._bounds(t)
                take = f("Or", f("And", take, f("Less", rank, most)), f("Less", rank, least))
        take = f("And", take, self._is(values))
        marked = f("ScatterElements", f("Mul", a, f.floats(0.0)), places, self._float(take), axis=2)
        return self._is(marked)

    def _bounds(self, t: _Tokens) -> tuple[ir.Value, ir.Value]:
        """int64 [T, 1]: minimum and maximum number of chosen units, besides those that are always read."""
        f, i = self.f, self.f.ints
        unit = i(self.rule.unit)
        start = self._first_seen(t.begin)
        last = f("Add", f("Div", t.end, unit), i(1))
        every = self._float(f("Sub", last, f("Div", start, unit)))
        always = f("Sub", last, f("Div", f("Max", t.far_end, start), unit))
        if not self.rule.columns:
            rest = f("Sub", i(BLOCK // self.rule.unit), f("Div", start, unit))
            always = f("Add", always, f("Max", rest, i(0)))
        least = f("Ceil", f("Mul", every, f.floats(self.rule.min_density)))
        most = f("Floor", f("Mul", every, f.floats(self.rule.max_density)))
        least = f("Max", f("Sub", self._int(least), always), i(0))
        return least, f("Max", f("Sub", self._int(most), always), least)

    def _or_dense(self, t: _Tokens, grid: _Grid, own: ir.Value, read: ir.Value) -> ir.Value:
        """`read`, plus every key for tokens and heads that are dense."""
        f, i = self.f, self.f.ints
        if self.rule.max_density * DENSE_ABOVE[1] > DENSE_ABOVE[0]:
            known = f("And", f("And", own, self._is(grid.occupied)), f("LessOrEqual", grid.position, t.end))
            known = self._within(known, grid.position, t.begin)  # [T, M]
            seen = f("ReduceSum", self._int(known), i([-1]), keepdims=1)
            reads = f("ReduceSum", self._int(f("And", known, read)), i([-1]), keepdims=1)
            most = f("Greater", f("Mul", reads, i(DENSE_ABOVE[1])), f("Mul", seen, i(DENSE_ABOVE[0])))
            read = f("Or", read, most)
        if self.rule.dense_below:
            read = f("Or", read, f("Less", t.end, i(self.rule.dense_below)))
        dense = [self.policy.dense_head(h) for h in range(self.kv_heads)]
        if any(dense):
            flags = f("Reshape", f.ints([int(d) for d in dense]), i([-1, 1, 1]))
            read = f("Or", read, f("Greater", flags, i(0)))
        return read
