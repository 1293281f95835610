"""Quantizes a graph: returns a new graph whose products have quantized weights and, optionally, quantized activations.

The result is standard ONNX: `DequantizeLinear` after each weight, and for activations a pair of `QuantizeLinear` and
`DequantizeLinear`, which an engine can turn into an 8-bit product or execute literally. Norms, biases and embedding
tables are not quantized; a table that is also the vocabulary matrix gets a quantized copy for that product.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from transom.errors import OptionError, SourceError
from transom.graph import Graph
from transom.graph.editing import Editor
from transom.graph.reading import linear_weight
from transom.graph.weights import FLOAT8, Array, Blocked, Dense, Weight, dequantize, preloaded
from transom.ops import find
from transom.quantize.calibration import Activations
from transom.quantize.rounding import BLOCKS, LARGEST_FLOAT8, to_float8, to_int4, to_int8
from transom.signature import METADATA_KEY

_CHUNK = 1 << 22
"""Number of weight elements that are compared at a time."""
_CHECKPOINT, _KEPT = "already quantized in the checkpoint", "kept as requested"


@dataclass(frozen=True)
class Scheme:
    """The target formats of a quantization.

    Raises:
        OptionError: a value is not one of those below.
    """

    weights: Literal["int4", "int8", "fp8"]
    """The format of weights; see `to_int4`, `to_int8` and `to_float8` in `transom.quantize.rounding`."""
    block: int | None = None
    """Columns that share a scale. None: 32 for int4, a whole row for int8. fp8 always has one scale per row."""
    activations: Literal["", "fp8"] = ""
    """The format of the inputs of quantized products, with one scale per value; empty: not quantized."""
    keep: Callable[[str], bool] | Collection[str] = ()
    """Products not to quantize: the names of their nodes, or a predicate on the name."""

    def __post_init__(self) -> None:
        if self.weights not in ("int4", "int8", "fp8"):
            raise OptionError(f"Weights cannot be quantized to {self.weights!r}", "Use int4, int8 or fp8")
        if self.activations not in ("", "fp8"):
            raise OptionError(f"Activations cannot be quantized to {self.activations!r}", "Use fp8, or leave it empty")
        if self.block is not None and self.weights == "fp8":
            raise OptionError("Weights in fp8 have one scale per row and no blocks", "Leave block out")
        if self.block is not None and (self.block < 1 or (self.weights == "int4" and self.block not in BLOCKS)):
            raise OptionError(
                f"{self.weights} weights do not support blocks of {self.block}", "Use a block of 32, 64 or 128"
            )

    def quantized(self, weight: Dense) -> Blocked:
        """The weight in this form. Raises OptionError where it does not fit."""
        if self.weights == "int4":
            return to_int4(weight, self.block or BLOCKS[0])
        return to_int8(weight, self.block) if self.weights == "int8" else to_float8(weight)

    def __str__(self) -> str:
        block = self.block or (BLOCKS[0] if self.weights == "int4" else 0)
        by = f"in blocks of {block}" if block else "by rows"
        return f"{self.weights} {by}" + (f", activations to {self.activations}" if self.activations else "")

    def keeps(self, node: str) -> bool:
        """Whether a product is not to be quantized."""
        return self.keep(node) if callable(self.keep) else node in self.keep


@dataclass(frozen=True)
class LayerError:
    """The effect of quantization on one product."""

    node: str
    form: str
    """`"int4 in blocks of 32"`."""
    bytes_before: int
    """Size of its weight; products that share a weight report the same."""
    bytes_after: int
    weight_error: float
    """‖W - Ŵ‖ / ‖W‖."""
    output_error: float | None
    """‖XWᵀ - X̂Ŵᵀ‖ / ‖XWᵀ‖ over the sampled rows X of its input, with X̂ as quantized; None without samples."""


@dataclass(frozen=True)
class QuantizedGraph:
    """A quantized graph, with the errors of quantization."""

    graph: Graph
    scheme: Scheme
    layers: tuple[LayerError, ...]
    """One entry per quantized product, in execution order."""
    left: tuple[tuple[str, str], ...]
    """Names of the products that were not quantized, each with the reason."""
    bytes_before: int
    """Size of all weights and constants of the graph."""
    bytes_after: int

    @property
    def summary(self) -> str:
        """One line for a report."""
        stayed = [reason for _, reason in self.left]
        words = [f"{stayed.count(r)} {r}" for r in (_CHECKPOINT, _KEPT) if r in stayed]
        rest = f"; not quantized: {', '.join(words)}" if words else ""
        if not self.layers:
            return f"no product quantized to {self.scheme}{rest}"
        worst = max(self.layers, key=_error_of)
        return (
            f"{len(self.layers)} products quantized to {self.scheme} (round to nearest): {_size(self.bytes_before)} to "
            f"{_size(self.bytes_after)}, weight error {np.median([x.weight_error for x in self.layers]):.2%} "
            f"(median), worst product {worst.node} with {_error_of(worst):.2%}{rest}"
        )

    def table(self) -> str:
        """A human-readable table of all products, largest error first."""
        head = ("product", "form", "before", "after", "weight error", "output error")
        lines = [head]
        for x in sorted(self.layers, key=_error_of, reverse=True):
            output = "" if x.output_error is None else f"{x.output_error:.2%}"
            sizes = (_size(x.bytes_before), _size(x.bytes_after))
            lines.append((x.node, x.form, *sizes, f"{x.weight_error:.2%}", output))
        lines += [(node, reason, "", "", "", "") for node, reason in self.left]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        left = 2  # the first columns are text, the others numbers
        return "\n".join(
            "  ".join(
                cell.ljust(width) if i < left else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )


def _error_of(layer: LayerError) -> float:
    return layer.weight_error if layer.output_error is None else layer.output_error


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def quantize(
    graph: Graph,
    scheme: Scheme,
    activations: Activations | None = None,
    progress: Callable[[float], None] | None = None,
) -> QuantizedGraph:
    """Quantize the products with a plain weight. The given graph is not changed.

    Weights of the new graph are quantized when they are read. They are read here once, to measure errors.

    Args:
        activations: the result of `calibrate` for this graph. Its bounds give the scales of activations, and its rows
            the output errors.
        progress: called with the completed fraction.

    Raises:
        OptionError: the scheme quantizes activations but none were observed, `keep` contains a name that is not a
            product, or a matrix, whose node the message names, cannot be quantized.
        SourceError: a weight is not finite.
    """
    if scheme.activations and activations is None:
        raise OptionError(
            f"Quantizing activations to {scheme.activations} requires their ranges",
            "Calibrate the model on some texts first",
        )
    model = graph.model.clone()
    before = _bytes(model)
    quantizer = _Quantizer(Editor(model), scheme, activations)
    products = [(n, w) for n in model.graph if (w := linear_weight(n)) is not None]
    _check_kept_names(scheme, [str(n.name) for n, _ in products])
    left: dict[str, str] = {}
    shared: dict[int, list[ir.Node]] = {}
    weights: dict[int, Dense] = {}
    for node, weight in products:
        if isinstance(weight, Blocked) or scheme.keeps(str(node.name)):
            left[str(node.name)] = _CHECKPOINT if isinstance(weight, Blocked) else _KEPT
            continue
        matrix = id(_matrix(node))
        shared.setdefault(matrix, []).append(node)
        weights[matrix] = weight
    total, done = sum(w.nbytes for w in weights.values()), 0
    errors: dict[str, LayerError] = {}
    for matrix, nodes in shared.items():
        weight = weights[matrix]
        errors |= {layer.node: layer for layer in quantizer.round(nodes, weight)}
        done += weight.nbytes
        if progress is not None:
            progress(done / total)
    quantizer.editor.finish_edit()
    after = _bytes(model)
    if graph.decoder is not None:
        changed = graph.decoder.weight_bytes + after - before
        if changed < 0:
            changed = after  # the graph's weights were replaced by larger ones, and its decoder did not say so
        model.metadata_props[METADATA_KEY] = replace(graph.decoder, weight_bytes=changed).to_json()
    layers = tuple(errors[str(n.name)] for n, _ in products if str(n.name) in errors)
    result = QuantizedGraph(graph, scheme, layers, tuple(left.items()), before, after)
    notes = (*graph.notes, result.summary)
    return replace(result, graph=Graph(model, weights_hash=_hash(graph.weights_hash, scheme), notes=notes))


def _check_kept_names(scheme: Scheme, names: Sequence[str]) -> None:
    unknown = [] if callable(scheme.keep) else sorted(set(scheme.keep) - set(names))
    if unknown:
        raise OptionError(
            f"The graph has no product {', '.join(unknown)} to keep",
            f"The products are named like {', '.join(names[:3])}",
        )


def _matrix(node: ir.Node) -> ir.Value:
    """The weight before its Transpose, for a node accepted by `linear_weight`."""
    transpose = node.inputs[1].producer() if node.inputs[1] is not None else None
    assert transpose is not None
    assert transpose.inputs[0] is not None
    return transpose.inputs[0]


def _bytes(model: ir.Model) -> int:
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


def _hash(weights_hash: str, scheme: Scheme) -> str:
    """The hash of the quantized weights; empty if the plain weights have none."""
    if not weights_hash:
        return ""
    text = f"{weights_hash} rounded to nearest {scheme}"
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class _Quantizer:
    """Writes quantized weights and activations into one model."""

    def __init__(self, editor: Editor, scheme: Scheme, activations: Activations | None) -> None:
        self.editor, self._scheme, self._activations = editor, scheme, activations
        self._pairs: dict[int, ir.Value] = {}
        """The quantized and dequantized activation for each value, by the value's `id`."""

    def round(self, nodes: Sequence[ir.Node], weight: Dense) -> list[LayerError]:
        """Quantize the weight that these products share, and their inputs."""
        name = str(nodes[0].name)
        try:
            quantized = self._scheme.quantized(weight)
            layers = self._errors(nodes, weight, quantized)
        except OptionError as e:
            raise OptionError(f"{name}: {e.cause}", e.fix or "Keep this product unquantized") from e
        matrix = self.editor.weight(quantized, f"{name}.weight")
        transposed = self.editor.op("Transpose", matrix, perm=[1, 0], name=f"{name}.weight.transposed")
        for node in nodes:
            node.replace_input_with(1, transposed)
            if self._scheme.activations:
                node.replace_input_with(0, self._quantized_input(node))
        return layers

    def _quantized_input(self, node: ir.Node) -> ir.Value:
        x = node.inputs[0]
        assert x is not None
        if id(x) not in self._pairs:
            by = [self.editor.constant(c, n) for c, n in zip(self._scale(node), ("scale", "zero_point"), strict=True)]
            codes = self.editor.op("QuantizeLinear", x, *by, name=f"{x.name}.quantized")
            self._pairs[id(x)] = self.editor.op("DequantizeLinear", codes, *by, name=f"{x.name}.dequantized")
        return self._pairs[id(x)]

    def _scale(self, node: ir.Node) -> tuple[Array, Array]:
        """The scale of a product's input, and a zero point, which determines the type of the codes."""
        assert self._activations is not None
        bound = self._activations.input(str(node.name)).bound
        scale = max(bound / LARGEST_FLOAT8, float(np.finfo(np.float32).tiny))
        return np.asarray(scale, np.float32), np.zeros((), FLOAT8)

    def _errors(self, nodes: Sequence[ir.Node], weight: Dense, quantized: Blocked) -> list[LayerError]:
        inputs = [self._samples(node) for node in nodes]
        off, size = 0.0, 0.0
        outputs = np.zeros((2, len(nodes)))
        for a, b in _row_chunks(weight, quantized):
            for i, pair in enumerate(inputs):
                if pair is not None:
                    wanted = pair[0] @ a.T
                    outputs[:, i] += _square(wanted - pair[1] @ b.T), _square(wanted)
            off, size = off + _square(a - b), size + _square(a)
        _check_finite(off, str(nodes[0].name))
        form = str(replace(self._scheme, activations=""))
        return [
            LayerError(
                str(node.name), form, weight.nbytes, quantized.nbytes, _ratio(off, size),
                None if pair is None else _ratio(*outputs[:, i]),
            )
            for i, (node, pair) in enumerate(zip(nodes, inputs, strict=True))
        ]  # fmt: skip

    def _samples(self, node: ir.Node) -> tuple[Array, Array] | None:
        """Sampled rows of a product's input, before and after quantization."""
        rows = None if self._activations is None else self._activations.input(str(node.name)).rows
        if rows is None or not len(rows):
            return None
        if not self._scheme.activations:
            return rows, rows
        scale, zero = self._scale(node)
        (codes,) = _reference("QuantizeLinear", rows, scale, zero)
        (wide,) = _reference("DequantizeLinear", codes, scale, zero)
        return rows, wide


def weight_error(name: str, before: Weight, after: Weight) -> float:
    """‖W - Ŵ‖ / ‖W‖ of a matrix and its replacement.

    Raises:
        SourceError: the matrix is not finite; the message names it.
    """
    off, size = 0.0, 0.0
    for a, b in _row_chunks(before, after):
        off, size = off + _square(a - b), size + _square(a)
    _check_finite(off, name)
    return _ratio(off, size)


def _row_chunks(before: Weight, after: Weight) -> Iterator[tuple[Array, Array]]:
    """Chunks of the same rows of both weights, in float32. Each weight is read once."""
    exact, other = preloaded(before), preloaded(after)
    rows, columns = before.shape
    count = max(1, _CHUNK // columns)
    for at in range(0, rows, count):
        part = slice(at, at + count)
        yield dequantize(exact, part), dequantize(other, part)


def _check_finite(off: float, name: str) -> None:
    if not np.isfinite(off):
        raise SourceError(f"The weight of {name} contains NaN or infinity", "Download or convert the checkpoint again")


def _reference(name: str, *inputs: Array) -> tuple[Array, ...]:
    schema: Any = find("", name)
    found: tuple[Array, ...] = schema.reference(inputs, {})
    return found


def _square(x: Array) -> float:
    """The squared norm of a chunk. Chunks are small enough for float32 sums to be accurate to a per cent."""
    flat = np.ascontiguousarray(x, np.float32).reshape(-1)
    return float(np.dot(flat, flat))


def _ratio(off: float, size: float) -> float:
    return float(np.sqrt(off / size)) if size else 0.0
