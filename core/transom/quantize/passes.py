"""Rounding a graph: a new one whose products have rounded weights and, where asked for, rounded activations.

What is written is standard ONNX: `DequantizeLinear` before a weight, and for activations a pair of `QuantizeLinear` and
`DequantizeLinear` that an engine multiplies in 8-bit floats, or computes as it stands. Norms, biases and embedding
tables stay as they are; a table that is the vocabulary matrix, too, gets a rounded copy for that.
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
from transom.graph.weights import FLOAT8, Array, Blocked, Dense, Weight, dequantize, held
from transom.ops import find
from transom.quantize.calibration import Activations
from transom.quantize.rounding import BLOCKS, LARGEST_FLOAT8, to_float8, to_int4, to_int8
from transom.signature import METADATA_KEY

_AT_ONCE = 1 << 22
"""Weights that are compared at a time."""
_CHECKPOINT, _ASKED = "quantised in the checkpoint", "left as asked for"


@dataclass(frozen=True)
class Scheme:
    """What to round to.

    Raises:
        OptionError: a value is none of those below.
    """

    weights: Literal["int4", "int8", "fp8"]
    """See `transom.quantize.rounding`: `to_int4`, `to_int8`, `to_float8`."""
    block: int | None = None
    """Columns that share a scale. None: 32 for int4; a whole row for int8 and fp8, the only form of fp8."""
    activations: Literal["", "fp8"] = ""
    """What the inputs of rounded products are rounded to, with one scale for each value; empty: nothing."""
    keep: Callable[[str], bool] | Collection[str] = ()
    """Products to leave as they are, by the names of their nodes: all of them, or a function that tells."""

    def __post_init__(self) -> None:
        if self.weights not in ("int4", "int8", "fp8"):
            raise OptionError(f"Weights are not rounded to {self.weights!r}", "Use int4, int8 or fp8")
        if self.activations not in ("", "fp8"):
            raise OptionError(f"Activations are not rounded to {self.activations!r}", "Use fp8, or leave it empty")
        if self.block is not None and self.weights == "fp8":
            raise OptionError("Weights in fp8 have a scale for each row and no blocks", "Leave block out")
        if self.block is not None and (self.block < 1 or (self.weights == "int4" and self.block not in BLOCKS)):
            raise OptionError(
                f"There are no {self.weights} weights in blocks of {self.block}", "Use a block of 32, 64 or 128"
            )

    def rounded(self, weight: Dense) -> Blocked:
        """The weight in this form. Raises OptionError where it does not fit."""
        if self.weights == "int4":
            return to_int4(weight, self.block or BLOCKS[0])
        return to_int8(weight, self.block) if self.weights == "int8" else to_float8(weight)

    def __str__(self) -> str:
        block = self.block or (BLOCKS[0] if self.weights == "int4" else 0)
        by = f"in blocks of {block}" if block else "by rows"
        return f"{self.weights} {by}" + (f", activations to {self.activations}" if self.activations else "")

    def keeps(self, node: str) -> bool:
        """Whether a product is left as it is."""
        return self.keep(node) if callable(self.keep) else node in self.keep


@dataclass(frozen=True)
class LayerError:
    """What rounding did to one product."""

    node: str
    form: str
    """`"int4 in blocks of 32"`."""
    bytes_before: int
    """Of its weight; products that share one have the same."""
    bytes_after: int
    weight_error: float
    """‖W - Ŵ‖ / ‖W‖."""
    output_error: float | None
    """‖XWᵀ - X̂Ŵᵀ‖ / ‖XWᵀ‖ over the sampled rows X of its input, X̂ as the graph rounds them; None without any."""


@dataclass(frozen=True)
class Quantized:
    """A rounded graph, and what that cost."""

    graph: Graph
    scheme: Scheme
    layers: tuple[LayerError, ...]
    """Of each product that was rounded, in the order in which they run."""
    left: tuple[tuple[str, str], ...]
    """Products that were not, and why."""
    bytes_before: int
    """Of all weights and constants of the graph."""
    bytes_after: int

    @property
    def summary(self) -> str:
        """One line for a report."""
        stayed = [reason for _, reason in self.left]
        words = [f"{stayed.count(r)} {r}" for r in (_CHECKPOINT, _ASKED) if r in stayed]
        rest = f"; not rounded: {', '.join(words)}" if words else ""
        if not self.layers:
            return f"no product rounded to {self.scheme}{rest}"
        worst = max(self.layers, key=_badness)
        return (
            f"{len(self.layers)} products rounded to nearest, {self.scheme}: {_size(self.bytes_before)} to "
            f"{_size(self.bytes_after)}, weights off by {np.median([x.weight_error for x in self.layers]):.2%} "
            f"(median), worst {worst.node} by {_badness(worst):.2%}{rest}"
        )

    def table(self) -> str:
        """All products for people, the worst first."""
        head = ("product", "form", "before", "after", "weight error", "output error")
        lines = [head]
        for x in sorted(self.layers, key=_badness, reverse=True):
            output = "" if x.output_error is None else f"{x.output_error:.2%}"
            sizes = (_size(x.bytes_before), _size(x.bytes_after))
            lines.append((x.node, x.form, *sizes, f"{x.weight_error:.2%}", output))
        lines += [(node, reason, "", "", "", "") for node, reason in self.left]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        left = 2  # columns of words; the others are numbers
        return "\n".join(
            "  ".join(
                cell.ljust(width) if i < left else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )


def _badness(layer: LayerError) -> float:
    return layer.weight_error if layer.output_error is None else layer.output_error


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def quantize(
    graph: Graph,
    scheme: Scheme,
    activations: Activations | None = None,
    progress: Callable[[float], None] | None = None,
) -> Quantized:
    """Round the products with a plain weight. The graph that is given stays as it is.

    Weights of the new graph are rounded when they are read. They are read here once, for the errors.

    Args:
        activations: what `calibrate` saw of this graph; activations are rounded by its bounds, and its rows tell
            the errors of outputs.
        progress: called with the share that is done.

    Raises:
        OptionError: activations are to be rounded and were not observed, `keep` names no product, or a matrix cannot
            be rounded so; names the node.
        SourceError: a weight is not finite.
    """
    if scheme.activations and activations is None:
        raise OptionError(
            f"Rounding activations to {scheme.activations} needs to know how large they get",
            "Calibrate the model on some texts first",
        )
    model = graph.model.clone()
    before = _bytes(model)
    work = _Rounding(Editor(model), scheme, activations)
    products = [(n, w) for n in model.graph if (w := linear_weight(n)) is not None]
    _need_products(scheme, [str(n.name) for n, _ in products])
    left: dict[str, str] = {}
    shared: dict[int, list[ir.Node]] = {}
    weights: dict[int, Dense] = {}
    for node, weight in products:
        if isinstance(weight, Blocked) or scheme.keeps(str(node.name)):
            left[str(node.name)] = _CHECKPOINT if isinstance(weight, Blocked) else _ASKED
            continue
        matrix = id(_matrix(node))
        shared.setdefault(matrix, []).append(node)
        weights[matrix] = weight
    total, done = sum(w.nbytes for w in weights.values()), 0
    errors: dict[str, LayerError] = {}
    for matrix, nodes in shared.items():
        weight = weights[matrix]
        errors |= {layer.node: layer for layer in work.round(nodes, weight)}
        done += weight.nbytes
        if progress is not None:
            progress(done / total)
    work.editor.finish_edit()
    after = _bytes(model)
    if graph.decoder is not None:
        changed = graph.decoder.weight_bytes + after - before
        model.metadata_props[METADATA_KEY] = replace(graph.decoder, weight_bytes=changed).to_json()
    layers = tuple(errors[str(n.name)] for n, _ in products if str(n.name) in errors)
    made = Quantized(graph, scheme, layers, tuple(left.items()), before, after)
    notes = (*graph.notes, made.summary)
    return replace(made, graph=Graph(model, weights_hash=_hash(graph.weights_hash, scheme), notes=notes))


def _need_products(scheme: Scheme, names: Sequence[str]) -> None:
    unknown = [] if callable(scheme.keep) else sorted(set(scheme.keep) - set(names))
    if unknown:
        raise OptionError(
            f"There is no product {', '.join(unknown)} to be left as it is",
            f"The products are named like {', '.join(names[:3])}",
        )


def _matrix(node: ir.Node) -> ir.Value:
    """The weight before its transposition, of a node that `linear_weight` knows."""
    transpose = node.inputs[1].producer() if node.inputs[1] is not None else None
    assert transpose is not None
    assert transpose.inputs[0] is not None
    return transpose.inputs[0]


def _bytes(model: ir.Model) -> int:
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


def _hash(weights_hash: str, scheme: Scheme) -> str:
    """Of the rounded weights; where the plain ones have none these are read instead, as ever."""
    if not weights_hash:
        return ""
    text = f"{weights_hash} rounded to nearest {scheme}"
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class _Rounding:
    """Writes rounded weights and activations into one model."""

    def __init__(self, editor: Editor, scheme: Scheme, activations: Activations | None) -> None:
        self.editor, self._scheme, self._activations = editor, scheme, activations
        self._pairs: dict[int, ir.Value] = {}
        """Rounded activations by the value that they stand for."""

    def round(self, nodes: Sequence[ir.Node], weight: Dense) -> list[LayerError]:
        """Round the weight that some products share, and their inputs."""
        name = str(nodes[0].name)
        try:
            rounded = self._scheme.rounded(weight)
            layers = self._errors(nodes, weight, rounded)
        except OptionError as e:
            raise OptionError(f"{name}: {e.cause}", e.fix or "Keep this product as it is") from e
        matrix = self.editor.weight(rounded, f"{name}.weight")
        transposed = self.editor.op("Transpose", matrix, perm=[1, 0], name=f"{name}.weight.transposed")
        for node in nodes:
            node.replace_input_with(1, transposed)
            if self._scheme.activations:
                node.replace_input_with(0, self._rounded_input(node))
        return layers

    def _rounded_input(self, node: ir.Node) -> ir.Value:
        x = node.inputs[0]
        assert x is not None
        if id(x) not in self._pairs:
            by = [self.editor.constant(c, n) for c, n in zip(self._scale(node), ("scale", "zero_point"), strict=True)]
            codes = self.editor.op("QuantizeLinear", x, *by, name=f"{x.name}.quantized")
            self._pairs[id(x)] = self.editor.op("DequantizeLinear", codes, *by, name=f"{x.name}.dequantized")
        return self._pairs[id(x)]

    def _scale(self, node: ir.Node) -> tuple[Array, Array]:
        """The scale of a product's input, and a zero point, which tells ONNX the type of the codes."""
        assert self._activations is not None
        bound = self._activations.input(str(node.name)).bound
        scale = max(bound / LARGEST_FLOAT8, float(np.finfo(np.float32).tiny))
        return np.asarray(scale, np.float32), np.zeros((), FLOAT8)

    def _errors(self, nodes: Sequence[ir.Node], weight: Dense, rounded: Blocked) -> list[LayerError]:
        inputs = [self._samples(node) for node in nodes]
        off, size = 0.0, 0.0
        outputs = np.zeros((2, len(nodes)))
        for a, b in _in_parts(weight, rounded):
            for i, pair in enumerate(inputs):
                if pair is not None:
                    wanted = pair[0] @ a.T
                    outputs[:, i] += _square(wanted - pair[1] @ b.T), _square(wanted)
            off, size = off + _square(a - b), size + _square(a)
        _need_finite(off, str(nodes[0].name))
        form = str(replace(self._scheme, activations=""))
        return [
            LayerError(
                str(node.name), form, weight.nbytes, rounded.nbytes, _ratio(off, size),
                None if pair is None else _ratio(*outputs[:, i]),
            )
            for i, (node, pair) in enumerate(zip(nodes, inputs, strict=True))
        ]  # fmt: skip

    def _samples(self, node: ir.Node) -> tuple[Array, Array] | None:
        """Some rows of a product's input, and the same as the graph will round them."""
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
    """‖W - Ŵ‖ / ‖W‖ of a matrix and what stands for it, some rows at a time.

    Raises:
        SourceError: the matrix is not finite; names it.
    """
    off, size = 0.0, 0.0
    for a, b in _in_parts(before, after):
        off, size = off + _square(a - b), size + _square(a)
    _need_finite(off, name)
    return _ratio(off, size)


def _in_parts(before: Weight, after: Weight) -> Iterator[tuple[Array, Array]]:
    """The same rows of both, float32, read once."""
    exact, other = held(before), held(after)
    rows, columns = before.shape
    count = max(1, _AT_ONCE // columns)
    for at in range(0, rows, count):
        part = slice(at, at + count)
        yield dequantize(exact, part), dequantize(other, part)


def _need_finite(off: float, name: str) -> None:
    if not np.isfinite(off):
        raise SourceError(
            f"The weight of {name} holds what is no number, or infinite", "Download or convert the checkpoint again"
        )


def _reference(name: str, *inputs: Array) -> tuple[Array, ...]:
    schema: Any = find("", name)
    found: tuple[Array, ...] = schema.reference(inputs, {})
    return found


def _square(x: Array) -> float:
    """Of a part, so that sums in float32 are exact enough for an error in per cent."""
    flat = np.ascontiguousarray(x, np.float32).reshape(-1)
    return float(np.dot(flat, flat))


def _ratio(off: float, size: float) -> float:
    return float(np.sqrt(off / size)) if size else 0.0
