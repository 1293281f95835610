"""Lowers operators to the float graph of one part with fixed shapes: S new tokens, C tokens in the cache.

Inputs: `hidden` float32 [1, S, H]; `positions` int32 [1, S]; `mask` float32 [1, 1, S, C + S], which is added to scores,
and `mask_window` if a layer has a sliding window; `past_key.N` and `past_value.N` [1, KV heads, C, columns]; and `row`
int32 [1] in the last part. Outputs: `new_key.N` and `new_value.N` [1, KV heads, S, columns]; `hidden_out`, or `logits`
float32 [1, 1, V] of the requested row. A sparsity policy adds inputs and outputs, see
`transom_mobile_export.qnn.sparse`.

S and C may be symbols: the graph then runs texts of any length in onnxruntime and reads every key, which is how ranges
are observed. Names do not depend on S and C, so that ranges observed in one graph apply to the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import onnx_ir as ir

from transom.graph.weights import Array, Weight, dequantize
from transom.programs.onnx_rows import RowOperators
from transom.programs.onnx_writing import FLOAT, INT32, OnnxWriter
from transom.programs.reading import GraphReader, Op, Value
from transom.sparsity.static import static_refusal
from transom_mobile_export.qnn import sparse, sparse_sizes
from transom_mobile_export.qnn.parts import GraphPart
from transom_mobile_export.qnn.precision import HEAD

if TYPE_CHECKING:
    from transom.sparsity import Sparsity

Dim = int | str
MASK, MASK_WINDOW = "mask", "mask_window"
UNSEEN = -1e4
"""Mask value for keys that are not seen, in float32."""
LAST = np.iinfo(np.int32).max
"""The end of a Slice that takes everything from its start."""


class HtpKernels:
    """The operators that this backend can write; see `transom.programs.Kernels`."""

    tile = 1
    largest_head = 1 << 16
    largest_group = 1 << 30
    interleaved = False
    float8 = False

    def matrix(self, weight: Weight) -> str:
        return "" if len(weight.shape) == 2 else f"a matrix with {len(weight.shape)} axes"

    def by(self, weight: Weight, *, head: bool) -> str:
        return HEAD if head else ""

    def policy(self, policy: Sparsity) -> str:
        return static_refusal(policy)


class Matrices(Protocol):
    """Writes the matrix of a product, [columns, rows], as float32."""

    def __call__(self, write: OnnxWriter, op: Op, name: str) -> ir.Value: ...


def plain(write: OnnxWriter, op: Op, name: str) -> ir.Value:
    """The matrix, not quantized."""
    weight = op.weight
    assert weight is not None
    rows, columns = weight.shape
    return write.weight(name, FLOAT, (columns, rows), lambda: dequantize(weight).T)


class ScopedWriter(OnnxWriter):
    """Names nodes by their position in their scope, independent of the rest of the graph."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._named: dict[str, int] = {}

    def several(
        self, op_type: str, *inputs: ir.Value | None, dtypes: Sequence[ir.DataType], **attributes: Any
    ) -> tuple[ir.Value, ...]:
        outputs = super().several(op_type, *inputs, dtypes=dtypes, **attributes)
        name = f"{self.scope}{op_type}"
        count = self._named[name] = self._named.get(name, 0) + 1
        node = outputs[0].producer()
        assert node is not None
        node.name = f"{name}_{count}"
        for i, value in enumerate(outputs):
            value.name = f"{node.name}.{i}" if i else node.name
        return outputs


@dataclass
class LoweredPart:
    """The graph of one part, and the roles of its values."""

    graph: ir.Graph
    masked: Mapping[str, str] = field(default_factory=dict)
    """Names of masked scores -> names of the scores."""
    shares: tuple[str, ...] = ()
    """Outputs of softmax."""
    wide: frozenset[str] = frozenset()
    """Values of the hidden state, which stay float16 when other values are quantized."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Name of each matrix -> the value that it multiplies."""
    watched: tuple[Watched, ...] = ()
    """Products with a matrix, and the hidden state after each layer except the model's last."""
    half: frozenset[str] = frozenset()
    """Values that choose units of keys: float16 in any precision."""
    like: Mapping[str, str] = field(default_factory=dict)
    """Values -> values of dense attention with the same range."""
    cached: Mapping[str, str] = field(default_factory=dict)
    """New keys, values and means -> the cache input whose encoding they share."""


@dataclass(frozen=True)
class Watched:
    """A value on which the quantized graph is compared with the float graph."""

    name: str
    node: str
    """The node of the neutral graph that computes it."""
    layer: int
    what: Literal["product", "residual"]


def lower(
    reader: GraphReader, part: GraphPart, *, tokens: Dim, cached: Dim, context: int, matrices: Matrices = plain,
    mask_low: float = UNSEEN,
) -> LoweredPart:  # fmt: skip
    """Write a part in float32. If S and C are symbols it reads every key, independent of the policy.

    Args:
        tokens, cached: S and C; numbers, or symbols of dynamic dimensions.
        context: number of positions, which is the number of rows of the rotation tables.
        mask_low: mask value for keys that are not seen.
    """
    return _Lowering(reader, part, tokens, cached, context, matrices, mask_low).lower()


@dataclass(frozen=True)
class _Heads:
    """Heads of one layer that attend in the same way."""

    q_heads: int
    kv_heads: int
    softcap: float
    sinks: Array | None
    window: int
    columns: tuple[int, int]
    """Columns of keys and of values."""

    def of(self, chosen: tuple[int, ...]) -> _Heads:
        """Some of the KV heads, with their query heads."""
        group = self.q_heads // self.kv_heads
        sinks = None if self.sinks is None else self.sinks.reshape(self.kv_heads, group)[list(chosen)].reshape(-1)
        return replace(self, q_heads=len(chosen) * group, kv_heads=len(chosen), sinks=sinks)


def named(value: ir.Value, name: str) -> ir.Value:
    """Give a value a name that is the same in all graphs of the part."""
    value.name = name
    return value


class _Lowering:
    def __init__(
        self, reader: GraphReader, part: GraphPart, tokens: Dim, cached: Dim, context: int, matrices: Matrices,
        mask_low: float,
    ) -> None:  # fmt: skip
        self.reader, self.decoder, self.part = reader, reader.decoder, part
        self.tokens, self.cached, self.context, self.matrices = tokens, cached, context, matrices
        self.total: Dim = "total"
        self._sizes: sparse_sizes.ChoiceSizes | None = None
        if isinstance(tokens, int) and isinstance(cached, int):
            self.total = tokens + cached
            if not reader.sparsity.dense:
                self._sizes = sparse_sizes.ChoiceSizes(reader.sparsity, cached, tokens)
        self._mask_low, self._marks = mask_low, sparse.Marks()
        self._step: sparse.StepInputs | None = None
        self.write = ScopedWriter("part")
        self._operators = RowOperators(self.write, self._of)
        self._values: dict[int, ir.Value] = {}
        """Values as rows, [1, S, width]."""
        self._heads: dict[int, ir.Value] = {}
        """Values as heads, [1, heads, S, columns]."""
        self._waves: dict[int, tuple[ir.Value, ir.Value]] = {}
        self._masks: dict[str, ir.Value] = {}
        self._masked: dict[str, str] = {}
        self._shares: list[str] = []
        self._watched: list[tuple[ir.Value, str, int, Literal["product", "residual"]]] = []
        self._wide: list[ir.Value] = []
        self._inputs: dict[str, ir.Value] = {}
        self._layer = part.first
        self._new: list[tuple[ir.Value, str, tuple[Dim, ...]]] = []
        self._cached: list[tuple[ir.Value, str]] = []

    def lower(self) -> LoweredPart:
        w, part = self.write, self.part
        self._values[id(part.source)] = w.input("hidden", FLOAT, (1, self.tokens, self.decoder.hidden))
        self._wide.append(self._values[id(part.source)])
        self.positions = w.input("positions", INT32, (1, self.tokens))
        self._past: dict[int, tuple[ir.Value, ir.Value]] = {}
        for i in range(part.first, part.end):
            cache = self.decoder.layers[i]
            key, value = (
                w.input(f"past_{what}.{i}", FLOAT, (1, cache.kv_heads, self.cached, columns))
                for what, columns in (("key", cache.head_dim), ("value", cache.value_dim))
            )
            self._past[i] = key, value
        self.row = w.input("row", INT32, (1 if isinstance(self.tokens, int) else "rows",)) if part.last else None
        for layer, ops in enumerate(part.layers, part.first):
            self._layer = layer
            for number, op in enumerate(ops):
                w.scope = f"{layer}.{number}.{op.kind}."
                self._draft(op)
            if layer + 1 < part.end or not part.last:
                self._watched.append((self._of(ops[-1].dst), ops[-1].node, layer, "residual"))
        result = self._of(part.result)
        if part.last:
            w.output(result, "logits", (1, 1 if isinstance(self.tokens, int) else "rows", self.decoder.vocabulary))
        else:
            w.output(result, "hidden_out", (1, self.tokens, self.decoder.hidden))
        for value, name, shape in self._new:
            w.output(value, name, shape)
        watched = tuple(Watched(str(v.name), node, layer, what) for v, node, layer, what in self._watched)
        wide = frozenset(str(value.name) for value in self._wide)
        inputs = {name: str(value.name) for name, value in self._inputs.items()}
        marks = self._marks
        return LoweredPart(
            w.graph, self._masked, tuple(self._shares), wide, inputs, watched,
            frozenset(str(value.name) for value in marks.wide),
            {str(value.name): name for value, name in marks.like},
            {str(value.name): name for value, name in self._cached},
        )  # fmt: skip

    # values -----------------------------------------------------------------------------------------------------------
    def _of(self, value: Value) -> ir.Value:
        """A value as rows, [1, S, width]."""
        if id(value) in self._values:
            return self._values[id(value)]
        w = self.write
        turned = w("Transpose", self._heads[id(value)], perm=[0, 2, 1, 3])
        found = self._values[id(value)] = w("Reshape", turned, w.ints([1, -1, value.width]))
        return found

    def _as_heads(self, value: Value, count: int) -> ir.Value:
        if id(value) not in self._heads:
            w = self.write
            split = w("Reshape", self._of(value), w.ints([1, -1, count, value.width // count]))
            self._heads[id(value)] = w("Transpose", split, perm=[0, 2, 1, 3])
        return self._heads[id(value)]

    # operators --------------------------------------------------------------------------------------------------------
    def _draft(self, op: Op) -> None:
        if op.kind == "rope":
            self._heads[id(op.dst)] = self._rope(op)
            return
        writers: Mapping[str, Callable[[Op], ir.Value]] = {
            **self._operators.writers, "rows": self._rows, "norm": self._norm, "linear": self._linear,
            "attend": self._attend,
        }  # fmt: skip
        found = self._values[id(op.dst)] = writers[op.kind](op)
        if op.kind in ("add", "rows"):
            self._wide.append(found)

    def _rows(self, op: Op) -> ir.Value:
        return self.write("Gather", self._of(op.inputs[0]), self.row, axis=1)

    def _norm(self, op: Op) -> ir.Value:
        w, x = self.write, self._of(op.inputs[0])
        gain = self._operators.vector(op.vector)
        if op.groups > 1:
            x = w("Reshape", x, w.ints([1, -1, op.groups, op.dst.width // op.groups]))
        x = w("RMSNormalization", x, gain, axis=-1, epsilon=float(op.scale))
        return x if op.groups == 1 else w("Reshape", x, w.ints([1, -1, op.dst.width]))

    def _linear(self, op: Op) -> ir.Value:
        w = self.write
        name = f"{w.scope}weight"
        self._inputs[name] = x = self._of(op.inputs[0])
        product = w("MatMul", x, self.matrices(w, op, name), dtype=FLOAT)
        self._watched.append((product, op.node, self._layer, "product"))
        if op.vector is None:
            return product
        return w("Add", product, self._operators.vector(op.vector))

    def _rope(self, op: Op) -> ir.Value:
        """Halves [a, b] of the rotated columns become [a cos - b sin, b cos + a sin]."""
        w = self.write
        x = self._as_heads(op.inputs[0], op.groups)
        columns = op.dst.width // op.groups
        pairs = self.reader.ropes[op.index][0].size
        cos, sin = self._rotations(op.index)
        a, b = self._columns(x, 0, pairs), self._columns(x, pairs, 2 * pairs)
        rotated = [
            w("Sub", w("Mul", a, cos), w("Mul", b, sin)),
            w("Add", w("Mul", b, cos), w("Mul", a, sin)),
        ]
        if columns > 2 * pairs:
            rotated.append(self._columns(x, 2 * pairs, columns))
        return w("Concat", *rotated, axis=3)

    def _columns(self, x: ir.Value, begin: int, end: int) -> ir.Value:
        w = self.write
        return w("Slice", x, w.ints([begin]), w.ints([end]), w.ints([3]))

    def _rotations(self, rope: int) -> tuple[ir.Value, ir.Value]:
        """Cosines and sines of the step's positions, [1, 1, S, pairs], shared by all layers."""
        if rope not in self._waves:
            w = self.write
            scope, w.scope = w.scope, f"rope.{rope}."
            cos, sin = (
                w("Unsqueeze", w("Gather", w.constant(table.astype(np.float32)), self.positions, axis=0), w.ints([1]))
                for table in self.reader.rotations(rope, self.context)
            )
            w.scope = scope
            self._waves[rope] = cos, sin
        return self._waves[rope]

    # attention --------------------------------------------------------------------------------------------------------
    def _mask(self, window: int) -> ir.Value:
        name = MASK_WINDOW if window else MASK
        if name not in self._masks:
            self._masks[name] = self.write.input(name, FLOAT, (1, 1, self.tokens, self.total))
        return self._masks[name]

    def _attend(self, op: Op) -> ir.Value:
        w, index = self.write, op.index
        cache = self.decoder.layers[index]
        scale, softcap, sinks = self.reader.layers[index]
        heads = _Heads(
            cache.q_heads, cache.kv_heads, softcap, None if sinks is None else np.asarray(sinks, np.float32),
            cache.sliding_window, (cache.head_dim, cache.value_dim),
        )  # fmt: skip
        q = named(w("Mul", self._as_heads(op.inputs[0], cache.q_heads), w.number(scale, FLOAT)), f"{w.scope}q")
        new = tuple(
            self._put(f"{what}.{index}", self._as_heads(value, cache.kv_heads), (1, cache.kv_heads, self.tokens, size))
            for what, value, size in zip(("key", "value"), op.inputs[1:], heads.columns, strict=True)
        )
        choosing: tuple[int, ...] = ()
        if self._sizes is not None:
            choosing = sparse_sizes.sparse_heads(self.reader.sparsity.layer(index), cache.kv_heads)
        self._masked[f"{w.scope}masked"] = f"{w.scope}{'capped' if softcap else 'scores'}"
        self._shares.append(f"{w.scope}shares")
        if not choosing:
            out = self._dense(heads, q, new, self._past[index])
        else:
            out = self._sparse(index, heads, choosing, q, new)
            others = tuple(h for h in range(cache.kv_heads) if h not in choosing)
            if others:
                group = cache.q_heads // cache.kv_heads
                key, value, keys, values = (self._of_heads(x, others, 1) for x in (*new, *self._past[index]))
                rest = self._dense(heads.of(others), self._of_heads(q, others, group), (key, value), (keys, values))
                order = np.argsort([h * group + g for h in (*choosing, *others) for g in range(group)])
                out = w("Gather", w("Concat", out, rest, axis=1), w.constant(order.astype(np.int32)), axis=1)
        return w("Reshape", w("Transpose", out, perm=[0, 2, 1, 3]), w.ints([1, -1, op.dst.width]))

    def _dense(self, heads: _Heads, q: ir.Value, new: tuple[ir.Value, ...], past: tuple[ir.Value, ...]) -> ir.Value:
        """Attention over the whole cache: [1, heads, S, Dv]."""
        w, group = self.write, heads.q_heads // heads.kv_heads
        keys, values = (w("Concat", before, x, axis=2) for before, x in zip(past, new, strict=True))
        # A 0 in a shape keeps the input's dimension: neither S nor C has to be known.
        if group > 1:
            q = w("Reshape", q, w.ints([1, heads.kv_heads, -1, heads.columns[0]]))
        scores = named(w("MatMul", q, w("Transpose", keys, perm=[0, 1, 3, 2])), f"{w.scope}scores")
        if group > 1:  # [1, KV, G * S, C + S]
            scores = w("Reshape", scores, w.ints([1, heads.q_heads, -1, 0]))
        if heads.softcap:  # head by head: 16 rows of one head are capped wrongly, see `compiling.require_capped`
            by = w.number(heads.softcap, FLOAT)
            ratio = named(w("Div", scores, by), f"{w.scope}ratio")
            scores = named(w("Mul", named(w("Tanh", ratio), f"{w.scope}tanh"), by), f"{w.scope}capped")
        masked = named(w("Add", scores, self._mask(heads.window)), f"{w.scope}masked")
        if heads.sinks is not None:
            masked = w("Concat", masked, self._sinks(scores, heads.sinks), axis=3)
        shares = named(w("Softmax", masked, axis=-1), f"{w.scope}shares")
        if heads.sinks is not None:
            shares = w("Slice", shares, w.ints([0]), w.ints([-1]), w.ints([3]))
        if group > 1:
            shares = w("Reshape", shares, w.ints([1, heads.kv_heads, -1, 0]))
        out = named(w("MatMul", shares, values), f"{w.scope}out")  # [1, KV, G * S, Dv]
        return out if group == 1 else w("Reshape", out, w.ints([1, heads.q_heads, -1, heads.columns[1]]))

    def _sparse(
        self, index: int, heads: _Heads, choosing: tuple[int, ...], q: ir.Value, new: tuple[ir.Value, ...]
    ) -> ir.Value:
        """Attention of the sparse heads: [1, heads, S, Dv]."""
        w, cache, sizes = self.write, self.decoder.layers[index], self._sizes
        assert sizes is not None
        scope, w.scope = w.scope, f"{w.scope}sparse."
        if self._step is None:
            self._step = sparse.StepInputs(w, sizes, self._mask_low, self._marks)
        means, variances = (
            w.input(f"past_{what}.{index}", FLOAT, (1, len(choosing), sizes.nodes, cache.head_dim))
            for what in ("mean", "variance")
        )
        self._marks.wide.append(variances)
        group = cache.q_heads // cache.kv_heads
        own = heads.of(choosing)
        head = sparse.Head(choosing, cache.kv_heads, group, cache.head_dim, cache.value_dim, heads.softcap, own.sinks)
        layer = sparse.SparseAttention(self._step, scope, head, self._past[index], (means, variances))
        key, value = (self._of_heads(x, choosing, 1) for x in new)
        out = layer.attend(self._of_heads(q, choosing, group), (key, value))
        mean, variance = layer.renewed(key)
        shape = (1, len(choosing), sizes.renewed_nodes, cache.head_dim)
        self._new += [(mean, f"new_mean.{index}", shape), (variance, f"new_variance.{index}", shape)]
        self._cached += [(x, f"past_key.{index}") for x in (mean, means)]
        w.scope = scope
        return out

    def _of_heads(self, x: ir.Value, heads: tuple[int, ...], group: int) -> ir.Value:
        """Some of the KV heads of [1, KV * group, S, columns]."""
        if len(heads) == self.decoder.layers[self._layer].kv_heads:
            return x
        every = [h * group + g for h in heads for g in range(group)]
        return self.write("Gather", x, self.write.constant(np.asarray(every, np.int32)), axis=1)

    def _put(self, name: str, new: ir.Value, shape: tuple[Dim, ...]) -> ir.Value:
        """A step's keys or values in the cache's dtype, which are also made an output."""
        put = self.write("Identity", new)
        self._new.append((put, f"new_{name}", shape))
        self._cached.append((put, f"past_{name}"))
        return put

    def _sinks(self, scores: ir.Value, sinks: Array) -> ir.Value:
        """A column of sinks behind scores [1, heads, S, T].

        It is added to zeros: the HTP computes a constant in a Concat wrongly for some values (QNN 2.51).
        """
        w = self.write
        last = w("Slice", scores, w.ints([-1]), w.ints([LAST]), w.ints([3]))
        zeros = named(w("Mul", last, w.number(0.0, FLOAT)), f"{w.scope}zeros")
        return named(w("Add", zeros, w.constant(sinks.reshape(1, -1, 1, 1))), f"{w.scope}sinks")
