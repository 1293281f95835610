"""Lowers a decoder to one ONNX model in the layout that ONNX Runtime GenAI runs.

Inputs: `input_ids` int64 [batch, tokens]; `attention_mask` int64 [batch, total], 1 for each token; and the caches
`past_key_values.N.key` and `.value` [batch, KV heads, past, columns]. Outputs: `logits` float32
[batch, tokens, vocabulary] and the caches as `present.N.key` and `.value` [batch, KV heads, total, columns]. If a
caller passes one buffer, longer than the total, as past and present, ONNX Runtime writes new tokens into it.

The operators are those of ONNX Runtime's own builders: `GroupQueryAttention` including rotation, window, soft cap and
sinks, `MatMulNBits`, `GatherBlockQuantized`, `SimplifiedLayerNormalization` and its variant with a skip connection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from transom.errors import OptionError, option
from transom.graph.weights import Array, Blocked, Weight, dequantize, preloaded
from transom.programs import fusing
from transom.programs.onnx_rows import RowOperators
from transom.programs.onnx_writing import FLOAT, INT32, INT64
from transom.programs.reading import GraphReader, Op, Value
from transom.quantize.passes import weight_error
from transom_mobile_export.onnx.packing import PackedBlocks, pack
from transom_mobile_export.onnx.precision import OnnxPrecision
from transom_mobile_export.onnx.quantizing import QuantizedWeight, form_of, named
from transom_mobile_export.onnx.writing import RuntimeWriter

if TYPE_CHECKING:
    from transom.signature import LayerCache
    from transom.sparsity import Sparsity

NUMBERS = {"float32": FLOAT, "float16": ir.DataType.FLOAT16}
HEAD_TILE = 8
"""ONNX Runtime's attention needs heads whose columns are a multiple of this."""
ROTATED_TILE = 16
"""To rotate inside attention, both the columns of a head and the rotated columns must be a multiple of this."""
ACCURACY = 4
"""`accuracy_level` of `MatMulNBits`: inputs are quantized to int8, block by block."""
PAST, PRESENT = "past_key_values.{}.{}", "present.{}.{}"


class GenAiKernels:
    """The operators that this backend can write; see `transom.programs.Kernels`."""

    tile = 1
    largest_head = 1 << 30
    largest_group = 1 << 30
    interleaved = True
    float8 = False

    def matrix(self, weight: Weight) -> str:
        if len(weight.shape) != 2:
            return f"a matrix with {len(weight.shape)} axes"
        if isinstance(weight, Blocked) and weight.shape[1] % weight.block:
            return f"blocks of {weight.block} in {weight.shape[1]} columns"
        return ""

    def by(self, weight: Weight, *, head: bool) -> str:
        return "vocabulary" if head else ""

    def policy(self, policy: Sparsity) -> str:
        return "" if policy.dense else "ONNX Runtime's attention reads all of its cache: leave the policy out"


def wrong_heads(layer: LayerCache) -> str:
    """Why ONNX Runtime's operators do not support the heads of a layer; empty if they do."""
    if layer.value_dim != layer.head_dim:
        return f"heads of {layer.head_dim} columns for keys and {layer.value_dim} for values"
    if layer.head_dim % HEAD_TILE:
        return f"heads of {layer.head_dim} columns, not a multiple of {HEAD_TILE}"
    return ""


@dataclass
class LoweredDecoder:
    """A model whose weights are already written."""

    model: ir.Model
    quantized: tuple[QuantizedWeight, ...]
    forms: tuple[str, ...]
    """Element types of the products' matrices as written."""


def lower(
    reader: GraphReader,
    precision: OnnxPrecision,
    context: int,
    write: RuntimeWriter,
    progress: Callable[[float], None] | None = None,
) -> LoweredDecoder:
    """Write a model's weights to the writer's file, and its graph.

    Args:
        context: positions in the rotation tables.
        progress: called with the share that is done; may raise.

    Raises:
        OptionError: a weight is too large for float16.
        SourceError: a weight to quantize is not finite.
    """
    return _Lowering(reader, precision, context, write).lower(progress or (lambda share: None))


class _Lowering:
    def __init__(self, reader: GraphReader, precision: OnnxPrecision, context: int, write: RuntimeWriter) -> None:
        self.reader, self.decoder, self.precision, self.context = reader, reader.decoder, precision, context
        self.write, self.number = write, NUMBERS[precision.number]
        self._operators = RowOperators(write, self._of)
        self._values: dict[int, ir.Value] = {}
        """Values as rows, float32 [batch, tokens, width]."""
        self._normed: dict[int, Op] = {}
        """Normalizations by the sum that they read."""
        self._parts: dict[int, list[Value]] = {}
        """Values that are columns of another value, by that value."""
        self._unrotated: dict[int, Op] = {}
        """Rotations that are fused into attention, by their result."""
        self._tables: dict[tuple[int, ir.DataType], tuple[ir.Value, ir.Value]] = {}
        self._sums: dict[tuple[int, int], ir.Value] = {}
        self._shared: dict[int, tuple[PackedBlocks, tuple[ir.Value, ir.Value, ir.Value | None]] | ir.Value] = {}
        """The written table of embeddings, by its key: the vocabulary matrix may be the same."""
        self._positions: ir.Value | None = None
        self._quantized: list[QuantizedWeight] = []
        self._forms: list[str] = []

    def lower(self, progress: Callable[[float], None]) -> LoweredDecoder:
        w = self.write
        self.ids = w.input("input_ids", INT64, ("batch_size", "sequence_length"))
        self.mask = w.input("attention_mask", INT64, ("batch_size", "total_sequence_length"))
        self._pasts = [self._past(i) for i in range(len(self.decoder.layers))]
        self._presents: dict[int, tuple[ir.Value, ir.Value]] = {}
        self._lengths = w("ReduceSum", self.mask, w.ints([1]), keepdims=0)
        self._last = w.cast(w("Sub", self._lengths, w.ints(1)), INT32)
        self._total = w.cast(w("Gather", w("Shape", self.mask), w.ints(1), axis=0), INT32)
        ops = self._plan()
        for done, op in enumerate(ops):
            progress(done / len(ops))
            w.scope = f"{op.kind}."
            self._draft(op)
        w.output(self._of(self.reader.logits), "logits", ("batch_size", "sequence_length", self.decoder.vocabulary))
        for i, c in enumerate(self.decoder.layers):
            shape = ("batch_size", c.kv_heads, "total_sequence_length", c.head_dim)
            for part, value in zip(("key", "value"), self._presents[i], strict=True):
                w.output(value, PRESENT.format(i, part), shape)
        return LoweredDecoder(w.model(), tuple(self._quantized), tuple(self._forms))

    def _past(self, layer: int) -> list[ir.Value]:
        """The inputs for a layer's cache, keys and values."""
        cache = self.decoder.layers[layer]
        shape = ("batch_size", cache.kv_heads, "past_sequence_length", cache.head_dim)
        return [self.write.input(PAST.format(layer, part), self.number, shape) for part in ("key", "value")]

    def _plan(self) -> list[Op]:
        """Fuse the program into fewer operators, and plan what ONNX Runtime's fused operators compute together."""
        ops = self._without_rows()
        ops = fusing.fuse_same_input(fusing.fuse_biases(fusing.fuse_scales(ops)), 1)
        readers = fusing.readers_of(ops)
        makers = fusing.makers_of(ops)
        for op in ops:
            for value in (op.dst, *op.inputs):
                if value.parent is not None:
                    parts = self._parts.setdefault(id(value.parent), [])
                    if all(value is not part for part in parts):
                        parts.append(value)
            if op.kind == "norm" and op.groups == 1:
                source = makers.get(id(op.inputs[0]))
                if source is not None and source.kind == "add":
                    self._normed.setdefault(id(source.dst), op)
            if op.kind == "attend" and (pair := self._rotations_inside(op, makers, readers)):
                self._unrotated |= {id(turn.dst): turn for turn in pair}
        return ops

    def _without_rows(self) -> list[Op]:
        """The program without the choice of rows: it gives the logits of all tokens."""
        chosen = {id(d.dst): d.inputs[0] for d in self.reader.ops if d.kind == "rows"}
        for op in self.reader.ops:
            op.inputs = [chosen.get(id(v), v) for v in op.inputs]
        return [d for d in self.reader.ops if d.kind != "rows"]

    def _rotations_inside(
        self, op: Op, makers: Mapping[int, Op], readers: Mapping[int, list[Op]]
    ) -> tuple[Op, Op] | None:
        """The rotations of queries and keys if attention can do both; None if it cannot or there are none."""
        q, k = (makers.get(id(v)) for v in op.inputs[:2])
        if q is None or k is None or q.kind != "rope" or k.kind != "rope":
            return None
        alone = len(readers[id(q.dst)]) == 1 and len(readers[id(k.dst)]) == 1
        turned = 2 * self.reader.ropes[q.index][0].size
        width = self.decoder.layers[op.index].head_dim
        fits = width % ROTATED_TILE == 0 and turned % ROTATED_TILE == 0
        return (q, k) if alone and fits and (q.index, q.interleaved) == (k.index, k.interleaved) else None

    # values -----------------------------------------------------------------------------------------------------------
    def _of(self, value: Value) -> ir.Value:
        if id(value) not in self._values:
            assert value.parent is not None
            self._split(value.parent)
        return self._values[id(value)]

    def _split(self, parent: Value) -> None:
        """Split a value into its parts, which are adjacent columns."""
        w, parts = self.write, sorted(self._parts[id(parent)], key=lambda part: part.offset)
        whole, sizes = self._of(parent), w.ints([part.width for part in parts])
        found = w.several("Split", whole, sizes, dtypes=[FLOAT] * len(parts), axis=-1)
        for part, value in zip(parts, found, strict=True):
            self._values[id(part)] = value

    def _set(self, value: Value, found: ir.Value) -> None:
        self._values[id(value)] = found

    # operators --------------------------------------------------------------------------------------------------------
    def _draft(self, op: Op) -> None:
        if id(op.dst) in self._values or id(op.dst) in self._unrotated:
            return
        writers: Mapping[str, Callable[[Op], ir.Value]] = {
            **self._operators.writers, "embed": self._embed, "norm": self._norm, "linear": self._linear,
            "add": self._add, "rope": self._rope, "attend": self._attend,
        }  # fmt: skip
        self._set(op.dst, writers[op.kind](op))

    def _norm(self, op: Op) -> ir.Value:
        w, x = self.write, self._of(op.inputs[0])
        gain, epsilon = self._operators.vector(op.vector), float(op.scale)
        if op.groups > 1:
            x = w("Reshape", x, w.ints([0, 0, op.groups, op.dst.width // op.groups]))
        x = w("SimplifiedLayerNormalization", x, gain, axis=-1, epsilon=epsilon, stash_type=1)
        return x if op.groups == 1 else w("Reshape", x, w.ints([0, 0, op.dst.width]))

    def _add(self, op: Op) -> ir.Value:
        norm = self._normed.get(id(op.dst))
        if norm is None:
            return self._operators.add(op)
        a, b = (self._of(v) for v in op.inputs)
        normed, _, _, total = self.write.contrib(
            "SkipSimplifiedLayerNormalization", a, b, self._operators.vector(norm.vector),
            dtypes=[FLOAT] * 4, epsilon=float(norm.scale),
        )  # fmt: skip
        self._set(norm.dst, normed)
        return total

    # matrices ---------------------------------------------------------------------------------------------------------
    def _formed(self, op: Op, *, vocabulary: bool) -> Weight:
        """The operator's matrix in the form that is written, in memory; the quantization error is noted."""
        assert op.weight is not None
        source = preloaded(op.weight)
        form = form_of(source, self.precision, vocabulary=vocabulary)
        if form is source:
            return source
        form = preloaded(form)
        name = "embedding" if op.kind == "embed" else op.node or "products of one input"
        self._quantized.append(QuantizedWeight(name, named(source), named(form), weight_error(name, source, form)))
        return form

    def _embed(self, op: Op) -> ir.Value:
        w, form = self.write, self._formed(op, vocabulary=True)
        if isinstance(form, Blocked) and not self.precision.exact:
            packed = pack(form)
            matrix = self._write_packed("embedding", packed)
            self._shared[op.key] = packed, matrix
            rows = self._rows_of_packed(packed, matrix, op.dst.width)
        else:
            table = w.stored("embedding", self._narrowed(dequantize(form), "embedding"))
            self._shared[op.key] = table
            rows = w.cast(w("Gather", table, self.ids, axis=0), FLOAT)
        return rows if op.scale == 1.0 else w("Mul", rows, w.number(op.scale, FLOAT))

    def _rows_of_packed(
        self, packed: PackedBlocks, matrix: tuple[ir.Value, ir.Value, ir.Value | None], width: int
    ) -> ir.Value:
        """The rows of the step's tokens, float32 [batch, tokens, width].

        Codes keep their axis of blocks, so that a product can share them. The effect of zero points is added later:
        ONNX Runtime 1.24 reads 4-bit zero points wrongly if codes have an axis of blocks.
        """
        w, (codes, scales, _) = self.write, matrix
        each = w("Reshape", scales, w.ints([-1, packed.scales.shape[1], 1]))
        (found,) = w.contrib(
            "GatherBlockQuantized", codes, self.ids, each, dtypes=[FLOAT], bits=packed.bits, block_size=packed.block,
            gather_axis=0, quantize_axis=2,
        )  # fmt: skip
        missing = packed.shifts if packed.zero_points is None else packed.zero_shifts()
        if missing is not None:
            shifts = w("Gather", w.stored("embedding.shifts", missing), self.ids, axis=0)
            found = w("Add", found, w("Unsqueeze", shifts, w.ints([-1])))
        return w("Reshape", found, w.ints([0, 0, width]))

    def _write_packed(self, name: str, packed: PackedBlocks) -> tuple[ir.Value, ir.Value, ir.Value | None]:
        """Codes, scales and zero points."""
        w = self.write
        zeros = None if packed.zero_points is None else w.stored(f"{name}.zero_points", packed.zero_points)
        return w.stored(name, packed.codes), w.stored(f"{name}.scales", packed.scales), zeros

    def _linear(self, op: Op) -> ir.Value:
        w, x = self.write, self._of(op.inputs[0])
        name = f"matrix_{len(self._forms) + 1}"
        shared = self._shared.get(op.key) if op.key else None
        if isinstance(shared, ir.Value):
            return self._plain(x, w("Transpose", shared, perm=[1, 0]), op)
        if shared is None:
            form = self._formed(op, vocabulary=op.by == "vocabulary")
            if not isinstance(form, Blocked) or self.precision.exact:
                return self._plain(x, w.stored(name, self._narrowed(dequantize(form).T, name)), op)
            packed = pack(form)
            shared = packed, self._write_packed(name, packed)
        return self._packed(x, op, name, *shared)

    def _plain(self, x: ir.Value, matrix: ir.Value, op: Op) -> ir.Value:
        """x [..., columns] times a matrix [columns, rows], float32."""
        w = self.write
        self._forms.append(self.precision.number)
        product = w.cast(w("MatMul", w.cast(x, self.number), matrix), FLOAT)
        return product if op.vector is None else w("Add", product, self._operators.vector(op.vector))

    def _packed(
        self,
        x: ir.Value,
        op: Op,
        name: str,
        packed: PackedBlocks,
        matrix: tuple[ir.Value, ir.Value, ir.Value | None],
    ) -> ir.Value:
        w, (codes, scales, zeros) = self.write, matrix
        self._forms.append(f"int{packed.bits}")
        bias = None if op.vector is None else self._operators.vector(op.vector)
        given: list[ir.Value | None] = [x, codes, scales, zeros, None, bias]
        while given[-1] is None:
            given.pop()
        blocks = packed.scales.shape[1]
        (product,) = w.contrib(
            "MatMulNBits", *given, dtypes=[FLOAT], bits=packed.bits, block_size=packed.block,
            K=blocks * packed.block, N=packed.scales.shape[0], accuracy_level=ACCURACY,
        )  # fmt: skip
        if packed.shifts is None:
            return product
        key = id(x), packed.block
        if key not in self._sums:
            by_block = w("Reshape", x, w.ints([0, 0, blocks, packed.block]))
            self._sums[key] = w("ReduceSum", by_block, w.ints([3]), keepdims=0)
        shifts = w.stored(f"{name}.shifts", np.ascontiguousarray(packed.shifts.T))
        return w("Add", product, w("MatMul", self._sums[key], shifts))

    def _narrowed(self, array: Array, name: str) -> Array:
        """A plain matrix in the model's dtype."""
        wide: Array = array
        with np.errstate(over="ignore"):
            narrow: Array = wide.astype(self.number.numpy())
        if self.number != FLOAT and not np.isfinite(narrow).all() and np.isfinite(wide).all():
            raise OptionError(
                f"{name} has numbers up to {float(np.abs(wide).max()):.4g}, and float16 ends at 65504",
                f"Use {option('precision', 'int8')} or 'exact'",
            )
        return narrow

    # attention --------------------------------------------------------------------------------------------------------
    def _rotations(self, rope: int, number: ir.DataType) -> tuple[ir.Value, ir.Value]:
        """Cosines and sines of a rope, [context, pairs], shared by all layers."""
        if (rope, number) not in self._tables:
            tables = self.reader.rotations(rope, self.context)
            cos, sin = (
                self.write.stored(f"rotation_{rope}.{name}.{number.name.lower()}", table.astype(number.numpy()))
                for name, table in zip(("cos", "sin"), tables, strict=True)
            )
            self._tables[rope, number] = cos, sin
        return self._tables[rope, number]

    def _rope(self, op: Op) -> ir.Value:
        """A rotation before attention, for those that attention cannot do itself."""
        w, width = self.write, op.dst.width // op.groups
        turned = 2 * self.reader.ropes[op.index][0].size
        cos, sin = self._rotations(op.index, FLOAT)
        partial = {} if turned == width else {"rotary_embedding_dim": turned}
        (found,) = w.contrib(
            "RotaryEmbedding", self._of(op.inputs[0]), self._places(), cos, sin, dtypes=[FLOAT],
            interleaved=int(op.interleaved), num_heads=op.groups, **partial,
        )  # fmt: skip
        return found

    def _places(self) -> ir.Value:
        """Positions of the step's tokens, int64 [batch, tokens], counted as attention does: a first prompt is padded at
        its end, and later tokens follow the cached ones."""
        if self._positions is None:
            w = self.write
            size = w("Gather", w("Shape", self.ids), w.ints(1), axis=0)
            total = w("Gather", w("Shape", self.mask), w.ints(1), axis=0)
            past = w("Mul", w("Sub", self._lengths, size), w("Min", w("Sub", total, size), w.ints(1)))
            steps = w("Range", w.ints(0), size, w.ints(1))
            self._positions = w("Add", w("Unsqueeze", past, w.ints([1])), w("Unsqueeze", steps, w.ints([0])))
        return self._positions

    def _attend(self, op: Op) -> ir.Value:
        w, cache = self.write, self.decoder.layers[op.index]
        scale, cap, sinks = self.reader.layers[op.index]
        turn = self._unrotated.get(id(op.inputs[0]))
        sources = list(op.inputs)
        cos = sin = None
        if turn is not None:
            cos, sin = self._rotations(turn.index, self.number)
            sources[:2] = [self._unrotated[id(v)].inputs[0] for v in sources[:2]]
        number = self.number
        whole = self._whole(sources)
        rows = [whole, None, None] if whole is not None else [self._of(v) for v in sources]
        given: list[ir.Value | None] = [
            *(None if x is None else w.cast(x, number) for x in rows), *self._pasts[op.index], self._last,
            self._total, cos, sin, None, None, None if sinks is None else w.constant(sinks.astype(number.numpy())),
        ]  # fmt: skip
        while given[-1] is None:
            given.pop()
        out, key, value = w.contrib(
            "GroupQueryAttention", *given, dtypes=[number] * 3, num_heads=cache.q_heads, kv_num_heads=cache.kv_heads,
            scale=float(scale), softcap=float(cap), local_window_size=cache.sliding_window or -1,
            do_rotary=int(turn is not None), rotary_interleaved=int(turn is not None and turn.interleaved),
        )  # fmt: skip
        self._presents[op.index] = key, value
        return w.cast(out, FLOAT)

    def _whole(self, sources: list[Value]) -> ir.Value | None:
        """The product that holds queries, keys and values one after another, which attention accepts packed; None if
        there is none."""
        parent, at = sources[0].parent, 0
        for value in sources:
            if value.parent is not parent or value.offset != at:
                return None
            at += value.width
        return self._of(parent) if parent is not None and at == parent.width else None
