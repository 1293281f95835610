"""Turns the float graph of a part into a quantized one: QuantizeLinear and DequantizeLinear follow every value.

The encoding of a value depends on its observed range, and on nothing that differs between the graphs of a part: the
cache that one writes is read by the other. Operators that only move numbers (Reshape, Transpose, Concat, …) have one
encoding for input and output, so that nothing is quantized twice.

The hidden state is not quantized: a few of its numbers are a thousand times as large as all others (Sun et al. 2024,
Massive activations in large language models, arXiv:2402.17762), and 65536 steps up to the largest would leave few for
the rest. It is quantized only if it comes close to float16's limit.

A masked score need not be far below the others, only far enough for a softmax. Its encoding therefore ends `MARGIN`
below the smallest score: a range down to -10000 would leave few of the 65536 codes to the scores that count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import onnx_ir as ir

from transom.graph.weights import Array, Blocked
from transom.programs.onnx_writing import FLOAT, OnnxWriter
from transom_mobile_export.qnn.lowering import MASK, MASK_WINDOW, LoweredPart
from transom_mobile_export.qnn.precision import QnnPrecision
from transom_mobile_export.qnn.quantizing import quantized
from transom_mobile_export.qnn.sparse import NEAR_MASK

if TYPE_CHECKING:
    from transom.programs.reading import Op
    from transom_mobile_export.qnn.observing import Range, Seen

MARGIN = 20.0
"""Distance of masked scores below the smallest score; e**-20 is below half a code of a softmax."""
HEADROOM = 1.25
"""Factor of a 16-bit encoding's range over the observed range: other texts have larger numbers, and those beyond the
range saturate. 8 bits have too few codes for headroom."""
SMALLEST = 1e-6
"""The scale of values that are always 0."""
LARGEST_WIDE = 50000.0
"""Magnitude of the hidden state beyond which it is quantized, too: float16 ends at 65504."""
MOVING = {
    "Reshape": (0,), "Transpose": (0,), "Unsqueeze": (0,), "Slice": (0,), "Gather": (0,), "Expand": (0,),
    "Concat": None,
}  # fmt: skip
"""Operators that only move numbers -> the inputs that hold these numbers; None: all."""
CACHE = "past_"
"""Prefix of the cache's inputs."""
UINT8, UINT16 = ir.DataType.UINT8, ir.DataType.UINT16


@dataclass(frozen=True)
class Encoding:
    """x = scale * (code - zero)."""

    scale: float
    zero: int
    dtype: ir.DataType

    @classmethod
    def of(cls, seen: Range, dtype: ir.DataType) -> Encoding:
        """The finest encoding that covers a range and 0."""
        low, high = min(seen[0], 0.0), max(seen[1], 0.0)
        most = 255 if dtype == UINT8 else 65535
        scale = float(np.float32(max((high - low) / most, SMALLEST)))
        return cls(scale, min(most, max(0, round(-low / scale))), dtype)

    def codes(self, x: Array) -> Array:
        most = 255 if self.dtype == UINT8 else 65535
        found: Array = np.clip(np.rint(np.asarray(x, np.float64) / self.scale) + self.zero, 0, most)
        return found.astype(self.dtype.numpy())


class QuantizedMatrices:
    """Writes matrices of products in the precision's form. Each is quantized once, since several graphs contain it.

    Args:
        squares: mean square of each column's input, by the name of the matrix; see `quantizing.quantized`.
        folder: where the quantized matrices are stored.

    Raises, when called, OptionError for 4 bits in rows that are not a multiple of a block.
    """

    def __init__(self, precision: QnnPrecision, squares: Mapping[str, Array], folder: Path) -> None:
        self._precision, self._squares, self._folder = precision, squares, folder

    def __call__(self, write: OnnxWriter, op: Op, name: str) -> ir.Value:
        assert op.weight is not None
        weight = quantized(op.weight, self._precision.weights_of(op), self._squares.get(name))
        rows, columns = weight.shape

        def quants() -> Array:
            return self._part(weight, name, "quants").T

        def scales() -> Array:
            return self._part(weight, name, "scales").astype(np.float32).T

        if weight.dtype == "int8":
            codes = write.weight(name, ir.DataType.INT8, (columns, rows), quants)
            by_row = write.weight(f"{name}.scales", FLOAT, (rows,), lambda: scales().reshape(-1))
            return write("DequantizeLinear", codes, by_row, dtype=FLOAT, axis=1)
        blocks = columns // weight.block
        codes = write.weight(name, ir.DataType.INT4, (columns, rows), lambda: quants().astype(ml_dtypes.int4))
        by_block = write.weight(f"{name}.scales", FLOAT, (blocks, rows), scales)
        return write("DequantizeLinear", codes, by_block, dtype=FLOAT, axis=0, block_size=weight.block)

    def _part(self, weight: Blocked, name: str, what: str) -> Array:
        """One array of a matrix, from its file."""
        paths = {part: self._folder / f"{name}.{part}.npy" for part in ("quants", "scales")}
        if not paths["scales"].exists():
            parts = weight.load()
            np.save(paths["quants"], parts.quants)
            np.save(paths["scales"], parts.scales)
        found: Array = np.load(paths[what], mmap_mode="r")
        return found


def add_quantization(lowered: LoweredPart, seen: Seen, cache: ir.DataType) -> None:
    """Insert QuantizeLinear and DequantizeLinear after every value of a graph except the hidden state, in place.

    Caches become inputs and outputs of codes, or float16; all other inputs and outputs stay float32.

    Args:
        cache: dtype of the codes, uint8 or uint16.
    """
    _Rounding(lowered.graph, Encodings(lowered, seen, cache)).run()
    add_half_cache(lowered)


class Encodings:
    """The encoding of each value of a float graph; see `add_quantization`."""

    def __init__(self, lowered: LoweredPart, seen: Seen, cache: ir.DataType) -> None:
        self.cache = cache
        self._lowered, self._seen = lowered, seen
        self._wide = lowered.wide if seen.widest <= LARGEST_WIDE else frozenset()
        self._group: dict[int, int] = {}
        for node in lowered.graph:
            for value in self._moved(node):
                self._group[self._root(value)] = self._root(node.outputs[0])
        inputs = {_name(value): value for value in lowered.graph.inputs}
        for kept in _values(lowered.graph):
            if (of := lowered.cached.get(_name(kept))) is not None:
                self._group[self._root(kept)] = self._root(inputs[of])
        self._caches = {self._root(v) for name, v in inputs.items() if name.startswith(CACHE) and self.rounds(v)}
        extents: dict[int, list[Range]] = {}
        for value in (*lowered.graph.inputs, *_values(lowered.graph)):
            root = self._root(value)
            if not self.rounds(value) or _name(value).startswith(CACHE):
                continue
            extent = self._extent(value, 1.0 if root in self._caches and cache != UINT16 else HEADROOM)
            if extent is not None:
                extents.setdefault(root, []).append(extent)
        self._of = {
            root: Encoding.of(
                (min(e[0] for e in found), max(e[1] for e in found)), cache if root in self._caches else UINT16
            )
            for root, found in extents.items()
        }

    def rounds(self, value: ir.Value) -> bool:
        return value.dtype == FLOAT and _name(value) not in self._wide | self._lowered.half

    def of(self, value: ir.Value) -> Encoding:
        return self._of[self._root(value)]

    def is_cached(self, value: ir.Value) -> bool:
        """Whether a value has the cache's dtype."""
        return self._root(value) in self._caches

    def _root(self, value: ir.Value) -> int:
        key = id(value)
        while (up := self._group.setdefault(key, key)) != key:
            key = up
        return key

    def _moved(self, node: ir.Node) -> list[ir.Value]:
        """The inputs that a node only moves."""
        if node.op_type not in MOVING:
            return []
        which = MOVING[node.op_type]
        return [v for i, v in enumerate(node.inputs) if v is not None and (which is None or i in which)]

    def _extent(self, value: ir.Value, room: float) -> Range | None:
        """The range of a value; None if it is only moved and was not observed."""
        name, masked = self._lowered.like.get(_name(value), _name(value)), self._lowered.masked
        if name in (MASK, MASK_WINDOW, NEAR_MASK):
            return self._seen.mask_low, 0.0
        if name in masked:
            least, most = self._seen.ranges[masked[name]]
            return HEADROOM * least - MARGIN, HEADROOM * most
        if name in self._lowered.shares:
            return 0.0, 1.0
        if value.const_value is not None:
            array = value.const_value.numpy()
            return float(array.min()), float(array.max())
        producer = value.producer()
        if name not in self._seen.ranges and producer is not None and producer.op_type in MOVING:
            return None
        least, most = self._seen.ranges[name]
        return room * least, room * most


def _name(value: ir.Value | None) -> str:
    return "" if value is None else str(value.name)


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    """All inputs and outputs of nodes, except the arrays of matrices."""
    for node in graph:
        if node.op_type != "DequantizeLinear":
            yield from (v for v in node.inputs if v is not None and not _is_matrix(v))
            yield from node.outputs


def _is_matrix(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type == "DequantizeLinear"


class _Rounding:
    def __init__(self, graph: ir.Graph, encodings: Encodings) -> None:
        self.graph, self.encodings = graph, encodings
        self._instead: dict[int, ir.Value] = {}
        """Replacements of values, by the value."""
        self._parameters: dict[Encoding, tuple[ir.Value, ir.Value]] = {}

    def run(self) -> None:
        nodes = [node for node in self.graph if node.op_type != "DequantizeLinear"]
        inputs = [v for v in self.graph.inputs if self.encodings.rounds(v)]
        given = {id(v): (i, _name(v)) for i, v in enumerate(self.graph.outputs)}
        encodings = {id(v): self.encodings.of(v) for n in nodes for v in n.outputs if self.encodings.rounds(v)}
        cached = {id(v) for n in nodes for v in n.outputs if self.encodings.is_cached(v)}
        wanted = [
            {i: self.encodings.of(v) for i, v in enumerate(n.inputs) if v is not None and v.const_value is not None
             and v.dtype == FLOAT and id(n.outputs[0]) in encodings}
            for n in nodes
        ]  # fmt: skip
        for given_in in inputs:
            self._input(given_in, self.encodings.of(given_in), nodes[0])
        for node, constants in zip(nodes, wanted, strict=True):
            for i, value in enumerate(list(node.inputs)):
                if i in constants and value is not None:
                    node.replace_input_with(i, self._constant(value, constants[i], node))
                elif id(value) in self._instead:
                    node.replace_input_with(i, self._instead[id(value)])
            out = node.outputs[0]
            if id(out) not in encodings:
                continue
            if node.op_type == "Identity":  # conversion to the cache's dtype: quantizing is all it does
                source = node.inputs[0]
                assert source is not None
                after = source.producer()
                assert after is not None
                codes, back = self._through(source, encodings[id(out)], after, _name(out))
            else:
                codes, back = self._through(out, encodings[id(out)], node, _name(out))
            self._instead[id(out)] = back
            if id(out) in given:
                place, name = given[id(out)]
                shown = codes if id(out) in cached else back
                out.name, shown.name, shown.shape = f"{name}.unrounded", name, out.shape
                self.graph.outputs[place] = shown
            if node.op_type == "Identity":
                self.graph.remove(node)

    def _through(self, value: ir.Value, by: Encoding, after: ir.Node, name: str) -> tuple[ir.Value, ir.Value]:
        """Codes of a value and the dequantized numbers, both inserted after a node."""
        scale, zero = self._parameter(by)
        codes = self._node("QuantizeLinear", [value, scale, zero], f"{name}.codes", by.dtype)
        back = self._node("DequantizeLinear", [codes.outputs[0], scale, zero], f"{name}.rounded", FLOAT)
        self.graph.insert_after(after, [codes, back])
        return codes.outputs[0], back.outputs[0]

    def _input(self, value: ir.Value, by: Encoding, first: ir.Node) -> None:
        scale, zero = self._parameter(by)
        name = _name(value)
        nodes = []
        if name.startswith(CACHE):
            value.type = ir.TensorType(by.dtype)
        else:
            nodes.append(self._node("QuantizeLinear", [value, scale, zero], f"{name}.codes", by.dtype))
        codes = nodes[0].outputs[0] if nodes else value
        nodes.append(self._node("DequantizeLinear", [codes, scale, zero], f"{name}.rounded", FLOAT))
        self.graph.insert_before(first, nodes)
        self._instead[id(value)] = nodes[-1].outputs[0]

    def _constant(self, value: ir.Value, by: Encoding, before: ir.Node) -> ir.Value:
        if id(value) not in self._instead:
            assert value.const_value is not None
            name = f"{_name(value)}.codes"
            tensor = ir.Tensor(by.codes(value.const_value.numpy()), name=name)
            codes = ir.Value(name=name, type=ir.TensorType(by.dtype), shape=value.shape, const_value=tensor)
            self.graph.register_initializer(codes)
            back = self._node("DequantizeLinear", [codes, *self._parameter(by)], f"{_name(value)}.rounded", FLOAT)
            self.graph.insert_before(before, [back])
            self._instead[id(value)] = back.outputs[0]
        return self._instead[id(value)]

    def _node(self, op_type: str, inputs: list[ir.Value], name: str, dtype: ir.DataType) -> ir.Node:
        node = ir.Node("", op_type, inputs, num_outputs=1, name=name)
        node.outputs[0].name, node.outputs[0].type = name, ir.TensorType(dtype)
        return node

    def _parameter(self, by: Encoding) -> tuple[ir.Value, ir.Value]:
        if by not in self._parameters:
            made = []
            for what, array in (("scale", np.float32(by.scale)), ("zero", by.dtype.numpy().type(by.zero))):
                name = f"{what}_{len(self._parameters)}"
                tensor = ir.Tensor(np.asarray(array), name=name)
                value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape([]), const_value=tensor)
                self.graph.register_initializer(value)
                made.append(value)
            self._parameters[by] = made[0], made[1]
        return self._parameters[by]


def add_half_cache(lowered: LoweredPart) -> None:
    """Change the float32 caches of a graph to float16, in place; all other inputs and outputs stay float32."""
    graph = lowered.graph
    first = next(iter(graph))
    for value in graph.inputs:
        if not _name(value).startswith(CACHE) or value.dtype != FLOAT:
            continue
        wide = _cast(value, f"{value.name}.wide", FLOAT)
        value.type = ir.TensorType(ir.DataType.FLOAT16)
        for node, index in [(use.node, use.idx) for use in list(value.uses()) if use.node is not wide]:
            node.replace_input_with(index, wide.outputs[0])
        graph.insert_before(first, [wide])
    for place, value in enumerate(graph.outputs):
        name = _name(value)
        if not name.startswith("new_") or value.dtype != FLOAT:
            continue
        narrow = _cast(value, name, ir.DataType.FLOAT16)
        value.name, narrow.outputs[0].shape = f"{name}.wide", value.shape
        graph.append(narrow)
        graph.outputs[place] = narrow.outputs[0]


def _cast(value: ir.Value, name: str, dtype: ir.DataType) -> ir.Node:
    node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(dtype))], num_outputs=1, name=name)
    node.outputs[0].name, node.outputs[0].type = name, ir.TensorType(dtype)
    return node
