"""Decoders with replaced matrices: random float8 codes, or plain numbers.

Quantizing a model of eight billion parameters takes longer than the whole run. An engine's speed does not depend on the
values, so codes, their scales and those of the inputs are random; the graph has the same nodes as a quantized one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir
from shaped import STRIDE, decoder, scaled, table

from transom.graph import Graph
from transom.graph.editing import Editor
from transom.graph.reading import linear_weight, vocabulary_products
from transom.graph.weights import FLOAT8, Blocked, BlockedArrays, Dense, Weight, dequantize

FORMS = ("f16", "fp8")
SPREAD, INT8_SPREAD = 96.0, 28.0
"""Standard deviations of random codes, whose largest are near 448 and 127, as in quantized rows."""
LARGEST_INPUT = 8.0
"""Assumed largest input of every product, for its scale: a random model's inputs are about normally distributed."""
LARGEST_CODE = 448.0


def shaped(shape: str, layers: int, context: int, form: str) -> Graph:
    """A random decoder of one of `shaped.SHAPES`, with another number of layers.

    Args:
        form: `"f16"`, or `"fp8"` as the backend quantizes: matrices and inputs of products in E4M3, the vocabulary
            matrix in int8 by rows.
    """
    graph = decoder(shape, context, "float16", layers)
    kept = vocabulary_products(graph)
    heads = {id(linear_weight(node)) for node in graph.nodes() if node.name in kept}

    def drawn(weight: Weight, number: int) -> Weight:
        if form == "f16":
            return drawn_float16(weight, number)
        return drawn_int8(weight, number) if id(weight) in heads else drawn_float8(weight, number)

    return changed(graph, drawn, form)


def changed(graph: Graph, change: Callable[[Weight, int], Weight], name: str) -> Graph:
    """The graph with other matrices in its products; embedding tables stay. Inputs of products with float8 matrices are
    quantized to float8, too.

    Args:
        change: returns the replacement of a matrix, given its index.
        name: name of the change, for the hash of the weights.
    """
    model = graph.model.clone()
    editor = Editor(model)
    matrices: dict[int, tuple[ir.Value, bool]] = {}
    inputs: dict[int, ir.Value] = {}
    for node in list(model.graph):
        weight = linear_weight(node)
        if weight is None:
            continue
        x, matrix = node.inputs[:2]
        assert x is not None
        assert matrix is not None
        transpose = matrix.producer()
        assert transpose is not None
        key = id(transpose.inputs[0])
        if key not in matrices:
            other = change(weight, len(matrices))
            stored = editor.weight(other, f"{node.name}.weight")
            turned = editor.op("Transpose", stored, perm=[1, 0], name=f"{node.name}.weight.transposed")
            matrices[key] = turned, isinstance(other, Blocked) and other.dtype == "float8e4m3fn"
        turned, float8 = matrices[key]
        node.replace_input_with(1, turned)
        if float8:
            if id(x) not in inputs:
                inputs[id(x)] = _through_float8(editor, x)
            node.replace_input_with(0, inputs[id(x)])
    editor.finish_edit()
    text = f"{graph.weights_hash} {name}"
    return Graph(model, weights_hash=hashlib.blake2b(text.encode(), digest_size=16).hexdigest(), notes=graph.notes)


def _through_float8(editor: Editor, x: ir.Value) -> ir.Value:
    scale = np.asarray(LARGEST_INPUT / LARGEST_CODE, np.float32)
    by = [editor.constant(scale, "scale"), editor.constant(np.zeros((), FLOAT8), "zero_point")]
    codes = editor.op("QuantizeLinear", x, *by, name=f"{x.name}.quantized")
    return editor.op("DequantizeLinear", codes, *by, name=f"{x.name}.dequantized")


@cache
def _codes() -> Any:
    return np.clip(table() * np.float32(SPREAD), -LARGEST_CODE, LARGEST_CODE).astype(FLOAT8)


@cache
def _whole_numbers() -> Any:
    return np.clip(np.rint(table() * np.float32(INT8_SPREAD)), -127, 127).astype(np.int8)


def _spread(numbers: Any, rows: int, columns: int, number: int) -> Any:
    """[rows, columns] of a table, in column order as in networks, so that nothing has to be transposed."""
    return np.resize(np.roll(numbers, number * STRIDE), (columns, rows)).T


def drawn_float8(weight: Weight, number: int) -> Blocked:
    """A matrix of random E4M3 codes with a scale for each row, in the shape of another one."""
    rows, columns = weight.shape

    def load() -> BlockedArrays:
        scales = np.full((rows, 1), columns**-0.5 / SPREAD, np.float32)
        return BlockedArrays(_spread(_codes(), rows, columns, number), scales)

    return Blocked((rows, columns), columns, "float8e4m3fn", "float32", load)


def drawn_int8(weight: Weight, number: int) -> Blocked:
    """A matrix of random int8 codes with a scale for each row, in the shape of another one."""
    rows, columns = weight.shape

    def load() -> BlockedArrays:
        scales = np.full((rows, 1), columns**-0.5 / INT8_SPREAD, np.float16)
        return BlockedArrays(_spread(_whole_numbers(), rows, columns, number), scales)

    return Blocked((rows, columns), columns, "int8", "float16", load)


def drawn_float16(weight: Weight, number: int) -> Dense:
    """A matrix of random numbers in float16, in the shape of another one."""
    rows, columns = weight.shape

    return Dense((rows, columns), "float16", lambda: _spread(scaled("float16", columns), rows, columns, number))


def plain(weight: Weight, number: int) -> Dense:
    """The same matrix unpacked to float16."""
    return Dense(weight.shape, "float16", lambda: dequantize(weight).astype(np.float16))


def matrix_bytes(graph: Graph) -> int:
    """Bytes of the matrices of all products, each of which a decoded token reads once."""
    return sum(w.nbytes for node in graph.nodes() if (w := linear_weight(node)) is not None)
