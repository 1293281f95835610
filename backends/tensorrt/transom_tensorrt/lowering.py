"""Lowers a decoder to one strongly typed ONNX model, which both TensorRT's parser and onnxruntime accept.

Inputs: `input_ids` int64 [batch, tokens]; `past` int64 [batch], the cached tokens of each sequence; `rows` int64
[rows], the tokens whose logits are wanted, counted over the whole step; and the caches `past_key.N`, `past_value.N`
[batch, KV heads, context, columns]. Outputs: `logits` float32 [rows, vocabulary]; the caches as `present_key.N` and
`present_value.N`, which an engine binds to the same memory; and `query.N`, which is never read: TensorRT's fused
attention has a kernel for grouped queries only if they are an output (tensorrt-rtx 1.7), and otherwise copies the whole
cache for each query head.

Everything between matrix products, the residual stream included, is computed in float32: several models exceed
float16's limit of 65504 there. Products and the cache are in the network's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from transom.graph.weights import Array, Weight, dequantize
from transom.ops.sparse_routing import BLOCK
from transom.programs import fusing
from transom.programs.onnx_rows import RowOperators
from transom.programs.onnx_writing import FLOAT, INT32, INT64, OnnxWriter
from transom.programs.reading import GraphReader, Op, Value
from transom.quantize.rounding import LARGEST_FLOAT8
from transom.signature import cache_input_names, cache_output_names
from transom.sparsity import Sparsity
from transom.sparsity.static import static_refusal
from transom_tensorrt import attention, forms, sparse
from transom_tensorrt.network import ALIGNMENT, LENGTHS, QUERY, KeptTensor

if TYPE_CHECKING:
    from transom.quantize.calibration import Activations
    from transom_tensorrt.precision import RtxPrecision

POSITIONS = 2 * BLOCK
"""Positions of a cache are a multiple of this: it then holds whole blocks, and each sequence's cache starts at an
address that TensorRT accepts, for any number of heads and columns."""
assert POSITIONS * 2 % ALIGNMENT == 0
NUMBERS = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16, "float32": FLOAT}


class RtxKernels:
    """The operators that this backend can write; see `transom.programs.Kernels`."""

    tile = 1
    largest_head = 256
    """Limit of TensorRT's fused attention."""
    largest_group = 1 << 30
    interleaved = True
    float8 = True

    def matrix(self, weight: Weight) -> str:
        return forms.refusal(weight)

    def by(self, weight: Weight, *, head: bool) -> str:
        return ""

    def policy(self, policy: Sparsity) -> str:
        return static_refusal(policy)


@dataclass
class LoweredNetwork:
    """A network whose weights are read when it is saved."""

    model: ir.Model
    inputs: Mapping[str, tuple[str | int, ...]]
    """Shape of each input, in numbers and the symbols `batch`, `tokens` and `rows`."""
    kept: tuple[KeptTensor, ...]
    fused: tuple[attention.Fused, ...]
    queries: tuple[int, ...]
    """Heads times columns of each output `query.N`."""


def lower(
    reader: GraphReader, precision: RtxPrecision, context: int, activations: Activations | None = None
) -> LoweredNetwork:
    """Build the network of a decoder.

    Args:
        context: positions in the cache.
        activations: observed ranges; needed for float8 attention.

    Raises:
        OptionError: raised when it is saved, if a weight is too large for the network's dtype.
    """
    return _Lowering(reader, precision, context, activations).lower()


def fuse(reader: GraphReader) -> list[Op]:
    """Fuse operators: scales into the embedding, biases into products, products of the same input into one."""
    ops = fusing.fuse_scales(list(reader.ops))
    ops = fusing.fuse_biases(ops)
    return fusing.fuse_same_input(ops, 1)


class _Lowering:
    def __init__(
        self, reader: GraphReader, precision: RtxPrecision, context: int, activations: Activations | None
    ) -> None:
        self.activations = activations
        self.reader, self.decoder, self.precision, self.context = reader, reader.decoder, precision, context
        self.positions = -(-context // POSITIONS) * POSITIONS
        """Positions of the caches."""
        self.number = NUMBERS[precision.number]
        self.write = OnnxWriter("decoder")
        self._operators = RowOperators(self.write, self._wide)
        self._values: dict[int, ir.Value] = {}
        """Values as rows, [batch * tokens, width]."""
        self._heads: dict[int, ir.Value] = {}
        """Values as heads, [batch, heads, tokens, columns]."""
        self._rounded: set[int] = set()
        """Values that were quantized to E4M3."""
        self._shapes: dict[str, tuple[str | int, ...]] = {}
        self._matrices = 0
        self._tables: dict[int, tuple[ir.Value, ir.Value]] = {}
        self._read = forms.LastRead()

    def _input(self, name: str, dtype: ir.DataType, *shape: str | int) -> ir.Value:
        self._shapes[name] = shape
        return self.write.input(name, dtype, shape)

    def lower(self) -> LoweredNetwork:
        w = self.write
        ids = self._input("input_ids", INT64, "batch", "tokens")
        past = self._input("past", INT64, "batch")
        self.rows = self._input("rows", INT64, "rows")
        size = w("Gather", w("Shape", ids), w.ints(1), axis=0)
        steps = w("Range", w.ints(0), size, w.ints(1))
        positions = w("Add", w("Unsqueeze", past, w.ints([1])), w("Unsqueeze", steps, w.ints([0])))
        last = w("ReduceMax", positions, w.ints([1]), keepdims=0)
        w("Cast", w("Add", last, w.ints(1)), dtype=INT32, to=int(INT32)).name = LENGTHS
        self.places = attention.Places(w, past, positions, self.positions)
        self.ids = w("Reshape", ids, w.ints([-1]))
        self._kept: list[tuple[ir.Value, KeptTensor]] = []
        self._queries: list[tuple[ir.Value, tuple[str | int, ...], int]] = []
        self._fused: list[tuple[ir.Node, ir.Value | None, bool]] = []
        self._grid: sparse.Blocks | None = None
        self._step_ids = ids
        self._sizes_of: dict[str, tuple[int, int]] = {}
        for i, cache in enumerate(self.decoder.layers):
            for name, columns in zip(cache_input_names(i), (cache.head_dim, cache.value_dim), strict=True):
                self._sizes_of[name] = cache.kv_heads, columns
        for op in fuse(self.reader):
            w.scope = f"{op.kind}."
            self._write(op)
        logits = w.cast(self._of(self.reader.logits), FLOAT)
        w.output(logits, "logits", ("rows", self.decoder.vocabulary))
        for value, kept in self._kept:
            w.output(value, kept.output, ("batch", *kept.shape))
        widths = []
        for i, (query, shape, width) in enumerate(self._queries):
            w.output(query, f"{QUERY}.{i}", shape)
            widths.append(width)
        fused = tuple(
            attention.Fused(str(node.name), *_first_three(node), "" if mask is None else str(mask.name), float8)
            for node, mask, float8 in self._fused
        )
        return LoweredNetwork(w.model(), self._shapes, tuple(k for _, k in self._kept), fused, tuple(widths))

    # values -----------------------------------------------------------------------------------------------------------
    def _of(self, value: Value) -> ir.Value:
        """A value as rows."""
        if id(value) in self._values:
            return self._values[id(value)]
        w = self.write
        if value.parent is not None:
            whole = self._of(value.parent)
            found = w("Slice", whole, w.ints([value.offset]), w.ints([value.offset + value.width]), w.ints([1]))
        else:
            found = attention.rows_of(w, self._heads[id(value)], value.width)
        self._values[id(value)] = found
        return found

    def _as_heads(self, value: Value, count: int) -> ir.Value:
        if id(value) not in self._heads:
            rows = self._of(value)
            self._heads[id(value)] = attention.heads(self.write, rows, self.places, count, value.width // count)
        return self._heads[id(value)]

    # operators --------------------------------------------------------------------------------------------------------
    def _write(self, op: Op) -> None:
        if op.kind == "rope":
            self._heads[id(op.dst)] = self._rope(op)
            return
        writers: Mapping[str, Callable[[Op], ir.Value]] = {
            **self._operators.writers, "embed": self._embed, "rows": self._rows, "norm": self._norm,
            "linear": self._linear, "attend": self._attend, "round": self._round,
        }  # fmt: skip
        self._values[id(op.dst)] = writers[op.kind](op)

    def _wide(self, value: Value) -> ir.Value:
        """A value in float32."""
        return self.write.cast(self._of(value), FLOAT)

    def _embed(self, op: Op) -> ir.Value:
        w, weight = self.write, op.weight
        assert weight is not None
        name = "embedding"

        def load() -> Array:
            return forms.narrowed(dequantize(weight), self.number, "the embedding")

        table = w.weight(name, self.number, weight.shape, load)
        rows = w.cast(w("Gather", table, self.ids, axis=0), FLOAT)
        return rows if op.scale == 1.0 else w("Mul", rows, w.number(op.scale, FLOAT))

    def _rows(self, op: Op) -> ir.Value:
        return self.write("Gather", self._of(op.inputs[0]), self.rows, axis=0)

    def _norm(self, op: Op) -> ir.Value:
        w, x = self.write, self._wide(op.inputs[0])
        gain = self._operators.vector(op.vector)
        if op.groups > 1:
            x = w("Reshape", x, w.ints([-1, op.groups, op.dst.width // op.groups]))
        x = w("RMSNormalization", x, gain, axis=-1, epsilon=float(op.scale), stash_type=1)
        return x if op.groups == 1 else w("Reshape", x, w.ints([-1, op.dst.width]))

    def _linear(self, op: Op) -> ir.Value:
        w = self.write
        assert op.weight is not None
        self._matrices += 1
        name = f"matrix_{self._matrices}"
        rounded = id(op.inputs[0]) in self._rounded
        linear = forms.LinearForm(w, self.number, op.weight, name, self._read, rounded)
        product = linear(self._of(op.inputs[0]))
        if op.vector is None:
            return product
        return w("Add", w.cast(product, FLOAT), self._operators.vector(op.vector))

    def _round(self, op: Op) -> ir.Value:
        self._rounded.add(id(op.dst))
        return forms.rounded_to_float8(self.write, self._wide(op.inputs[0]), op.scale)

    def _rope(self, op: Op) -> ir.Value:
        w = self.write
        x = w.cast(self._as_heads(op.inputs[0], op.groups), FLOAT)
        cos, sin = self._rotations(op.index)
        turned = 2 * self.reader.ropes[op.index][0].size
        partial: dict[str, Any] = {} if turned == op.dst.width // op.groups else {"rotary_embedding_dim": turned}
        return w("RotaryEmbedding", x, cos, sin, self.places.positions, interleaved=int(op.interleaved), **partial)

    def _rotations(self, rope: int) -> tuple[ir.Value, ir.Value]:
        """Cosines and sines of a rope, float32 [context, pairs], shared by all layers."""
        if rope not in self._tables:
            tables = self.reader.rotations(rope, self.context)
            cos, sin = (self.write.constant(table.astype(np.float32)) for table in tables)
            self._tables[rope] = cos, sin
        return self._tables[rope]

    # attention --------------------------------------------------------------------------------------------------------
    def _attend(self, op: Op) -> ir.Value:
        w, index = self.write, op.index
        cache = self.decoder.layers[index]
        layer = attention.LayerAttention(cache, *self.reader.layers[index])
        keys, values = (
            self._keep(name, output, w.cast(self._as_heads(value, cache.kv_heads), self.number))
            for name, output, value in zip(
                cache_input_names(index), cache_output_names(index), op.inputs[1:], strict=True
            )
        )
        policy = self.reader.sparsity.layer(index)
        every = range(cache.kv_heads)
        one_for_all = policy.heads is not None and len(policy.heads) == 1
        dense = [h for h in every if policy.dense_head(0 if one_for_all else h)]
        if len(dense) == cache.kv_heads:
            return self._dense(op.node, layer, self._as_heads(op.inputs[0], cache.q_heads), keys, values)
        q = self._wide(op.inputs[0])
        chosen = [h for h in every if h not in dense]
        part = sparse.SparseHeads(layer.of(chosen), tuple(chosen), cache.kv_heads)
        found = self._sparse(index, part, self._of_heads(q, layer, chosen), keys, values)
        if not dense:
            return found
        few = w.constant(np.asarray(dense, np.int64))
        some = layer.of(dense)
        own = attention.heads(w, self._of_heads(q, layer, dense), self.places, some.cache.q_heads, cache.head_dim)
        whole = self._dense(op.node, some, own, *(w("Gather", x, few, axis=1) for x in (keys, values)))
        order = np.argsort([*chosen, *dense])
        group = cache.q_heads // cache.kv_heads * cache.value_dim
        parts = [w("Reshape", x, w.ints([-1, n, group])) for x, n in ((found, len(chosen)), (whole, len(dense)))]
        together = w("Gather", w("Concat", *parts, axis=1), w.constant(np.asarray(order, np.int64)), axis=1)
        return w("Reshape", together, w.ints([-1, op.dst.width]))

    def _of_heads(self, q: ir.Value, layer: attention.LayerAttention, heads: Sequence[int]) -> ir.Value:
        """The columns of queries [rows, all query heads * columns] that belong to some KV heads."""
        w, kv_heads = self.write, layer.cache.kv_heads
        if len(heads) == kv_heads:
            return q
        split = w("Reshape", q, w.ints([-1, kv_heads, layer.cache.q_heads // kv_heads * layer.cache.head_dim]))
        some = w("Gather", split, w.constant(np.asarray(heads, np.int64)), axis=1)
        return w("Reshape", some, w.ints([-1, layer.of(heads).cache.q_heads * layer.cache.head_dim]))

    def _keep(self, name: str, output: str, new: ir.Value) -> ir.Value:
        """Update a cache with the step's keys or values, [batch, heads, tokens, columns]."""
        assert new.dtype is not None
        heads, columns = self._sizes_of[name]
        before = self._input(name, new.dtype, "batch", heads, self.positions, columns)
        after = self.write("TensorScatter", before, new, self.places.past, axis=-2)
        self._kept.append((after, KeptTensor(name, output, (heads, self.positions, columns), self.precision.number)))
        return after

    def _dense(
        self, node: str, layer: attention.LayerAttention, q: ir.Value, keys: ir.Value, values: ir.Value
    ) -> ir.Value:
        """Attention of queries [batch, heads, tokens, columns] over all keys that they see; returns rows."""
        w, cache = self.write, layer.cache
        window = layer.window(self.positions)
        mask = self.places.visible(window)
        query = w.cast(w("Mul", w.cast(q, FLOAT), w.number(layer.scale, FLOAT)), self.number)
        sinks = None
        if layer.sinks is not None:
            sinks = w.constant(np.asarray(layer.sinks, np.float32).reshape(1, cache.kv_heads, -1, 1, 1))
        scales = self._attention_scales(node, layer)
        out = attention.attend(w, layer, query, keys, values, mask, sinks=sinks, scales=scales)
        self._remember(out, query, layer, mask if window else None, scales is not None)
        return attention.rows_of(w, out, cache.q_heads * cache.value_dim)

    def _sparse(self, index: int, part: sparse.SparseHeads, q: ir.Value, keys: ir.Value, values: ir.Value) -> ir.Value:
        """Attention over the keys that its blocks choose; rows in, rows out."""
        w, layer, blocks = self.write, part.layer, self._blocks()
        shape = (len(part.heads), blocks.sizes.nodes, layer.cache.head_dim)
        names = [(f"past_{what}.{index}", f"present_{what}.{index}") for what in ("mean", "variance")]
        before = [self._input(name, FLOAT, "batch", *shape) for name, _ in names]
        nodes = sparse.updated_nodes(blocks, part, keys, *before)
        for value, (name, output) in zip(nodes, names, strict=True):
            self._kept.append((value, KeptTensor(name, output, shape, "float32")))
        found = sparse.read(blocks, part, q, keys, values, *nodes)
        scaled = w.cast(w("Mul", q, w.number(layer.scale, FLOAT)), self.number)
        query = sparse.grid(blocks, part, scaled)
        group = layer.cache.q_heads // layer.cache.kv_heads
        single = replace(layer, cache=replace(layer.cache, q_heads=group, kv_heads=1))
        sinks = None
        if layer.sinks is not None:
            column = w.constant(np.asarray(layer.sinks, np.float32).reshape(1, layer.cache.kv_heads, 1, group))
            each = w("Expand", column, blocks.shape(blocks.batch, layer.cache.kv_heads, blocks.blocks, group))
            sinks = w("Reshape", each, w.ints([-1, 1, group, 1, 1]))
        out = attention.attend(w, single, query, found.keys, found.values, found.seen, sinks=sinks)
        self._remember(out, query, single, found.seen, False, width=layer.cache.q_heads * layer.cache.head_dim)
        return sparse.ungrid(blocks, part, out)

    def _remember(
        self,
        out: ir.Value,
        query: ir.Value,
        layer: attention.LayerAttention,
        mask: ir.Value | None,
        float8: bool,
        width: int = 0,
    ) -> None:
        """Record an attention node that TensorRT can fuse, and make its queries an output."""
        if not layer.fused(self.number):
            return
        node = out.producer()
        assert node is not None
        self._fused.append((node, mask, float8))
        shape = ("batch" if not width else "blocks", layer.cache.q_heads, "tokens" if not width else "places",
                 layer.cache.head_dim)  # fmt: skip
        self._queries.append((query, shape, width or layer.cache.q_heads * layer.cache.head_dim))

    def _blocks(self) -> sparse.Blocks:
        if self._grid is None:
            sizes = sparse.SparseSizes(self.reader.sparsity, self.positions)
            self._grid = sparse.Blocks(self.write, self.places.past, self._step_ids, sizes)
        return self._grid

    def _attention_scales(self, node: str, layer: attention.LayerAttention) -> tuple[float, float, float] | None:
        """E4M3 scales of queries, keys and values; None: they are not quantized."""
        if not self.precision.attention or self.activations is None or not layer.fused(self.number):
            return None
        q, k, v = (self.activations.input(node, i).bound / LARGEST_FLOAT8 for i in range(3))
        return q * layer.scale, k, v


def _first_three(node: ir.Node) -> tuple[str, str, str]:
    """The names of a node's first three inputs."""
    q, k, v = (str(x.name) for x in node.inputs[:3] if x is not None)
    return q, k, v
