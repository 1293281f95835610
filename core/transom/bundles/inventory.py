"""The weights of a decoder graph by use and layer: the matrices of its products, its vocabulary matrix, its embedding
table, and the rest. Only shapes are used; no weight is read.

A product belongs to the layer whose queries, keys or values are computed from it, or else to the layer of the last
attention before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from transom.graph import Graph
from transom.graph.reading import attributes_of, linear_weight, vocabulary_products, weight_of
from transom.graph.sparse import is_attention
from transom.graph.weights import Blocked, Weight


@dataclass(frozen=True)
class Matrix:
    """One matrix of a product, [rows, columns]."""

    rows: int
    columns: int
    layer: int
    stored: Blocked | None = None
    """The checkpoint's quantized blocks, not read; None: the matrix is not stored in blocks."""

    @property
    def numbers(self) -> int:
        return self.rows * self.columns

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns


@dataclass(frozen=True)
class Inventory:
    """All weights of a decoder. A matrix that several products share is listed once."""

    products: tuple[Matrix, ...]
    vocabulary: tuple[Matrix, ...]
    """The matrices whose product is the logits, also when such a matrix is the embedding table too."""
    embedding: Matrix | None
    tied: bool
    """The vocabulary matrix is the embedding table."""
    rest: int
    """The count of all other numbers: norms, biases, sinks, and weights of products that are not recognized."""


@dataclass
class _Walk:
    """What the walk through a graph has found so far."""

    computed: set[int] = field(default_factory=set)
    """Values that depend on an input, by id."""
    used: set[str] = field(default_factory=set)
    """Initializers that are part of a matrix."""


def inventory(graph: Graph) -> Inventory:
    """The inventory of a decoder graph. Its weights are never loaded."""
    walk = _Walk({id(v) for v in graph.model.graph.inputs})
    nodes = list(graph.nodes())
    for node in nodes:
        if any(id(v) in walk.computed for v in node.inputs if v is not None):
            walk.computed.update(id(v) for v in node.outputs)
    layers, heads = _layers(nodes, walk), vocabulary_products(graph)
    products: dict[int, Matrix] = {}
    vocabulary: dict[int, Matrix] = {}
    embedding, table = None, 0
    (ids,) = (v for v in graph.model.graph.inputs if v.name == "input_ids")
    for node in nodes:
        weight = linear_weight(node)
        if weight is not None and node.inputs[1] is not None:
            transpose = node.inputs[1].producer()
            assert transpose is not None
            found = vocabulary if node.name in heads else products
            found.setdefault(id(transpose.inputs[0]), _matrix(weight, layers[id(node)]))
            walk.used.update(_initializers(node.inputs[1]))
        elif node.op_type == "Gather" and not node.domain and node.inputs[1] is ids:
            weight = weight_of(node.inputs[0])
            if weight is not None and len(weight.shape) == 2:
                embedding, table = _matrix(weight, 0), id(node.inputs[0])
                walk.used.update(_initializers(node.inputs[0]))
    others = (v for name, v in graph.model.graph.initializers.items() if name not in walk.used)
    rest = sum(math.prod(v.shape.numpy()) for v in others if v.shape is not None and v.dtype in _FLOATS)
    return Inventory(tuple(products.values()), tuple(vocabulary.values()), embedding, table in vocabulary, rest)


_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def _matrix(weight: Weight, layer: int) -> Matrix:
    rows, columns = weight.shape
    return Matrix(rows, columns, layer, weight if isinstance(weight, Blocked) else None)


def _initializers(value: ir.Value | None) -> Iterator[str]:
    """The names of the initializers that a constant value is computed from."""
    if value is None:
        return
    if value.const_value is not None:
        yield str(value.name)
    node = value.producer()
    for v in node.inputs if node is not None else ():
        yield from _initializers(v)


def _layers(nodes: list[ir.Node], walk: _Walk) -> dict[int, int]:
    """The layer of each node with a matrix, by the node's id."""
    found: dict[int, int] = {}
    for node in nodes:
        if is_attention(node):
            layer = int(attributes_of(node)["layer"])
            for product in _behind(node.inputs[:3], walk):
                found.setdefault(id(product), layer)
    last = 0
    for node in nodes:
        if is_attention(node):
            last = int(attributes_of(node)["layer"])
        found.setdefault(id(node), last)
    return found


def _behind(values: Sequence[ir.Value | None], walk: _Walk) -> Iterator[ir.Node]:
    """The nodes that compute some values, back to the hidden state: a sum of two computed values."""
    left, seen = list(values), set[int]()
    while left:
        value = left.pop()
        node = None if value is None or id(value) not in walk.computed else value.producer()
        if node is None or id(node) in seen or is_attention(node):
            continue
        seen.add(id(node))
        if node.op_type == "Add" and all(id(v) in walk.computed for v in node.inputs):
            continue
        yield node
        left += node.inputs
