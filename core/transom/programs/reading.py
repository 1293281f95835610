"""Reads a neutral decoder graph, node by node, into operators of an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import onnx_ir as ir

from transom.graph.pageable import unpageable_reason
from transom.graph.reading import (
    attributes_of,
    constant_of,
    element_type,
    linear_weight,
    vocabulary_products,
    weight_of,
)
from transom.graph.sparse import is_attention
from transom.graph.weights import Array, Dense, Weight, dequantize
from transom.sparsity import Sparsity, joined

if TYPE_CHECKING:
    from transom.graph import Graph

FLOAT = 1
"""ONNX's code for float32."""
FLOAT8 = ir.DataType.FLOAT8E4M3FN


class Kernels(Protocol):
    """What an engine's kernels support."""

    tile: int
    """The widths of heads, rotated heads and normalized rows are multiples of this."""
    largest_head: int
    """Maximum columns of a head."""
    largest_group: int
    """Maximum query heads per KV head."""
    interleaved: bool
    """Whether RoPE on interleaved pairs is supported, in addition to pairs from a head's two halves."""
    float8: bool
    """Whether inputs of products may be quantized to E4M3."""

    def matrix(self, weight: Weight) -> str:
        """Why it cannot multiply by such a matrix, for example `"blocks of 12 columns"`; empty if it can."""
        ...

    def by(self, weight: Weight, *, head: bool) -> str:
        """Number format of the activations in a product with the matrix, in the engine's own terms: `Op.by`.

        Args:
            head: whether it is the vocabulary matrix.
        """
        ...

    def policy(self, policy: Sparsity) -> str:
        """Why it cannot apply such a policy; empty if it can."""
        ...


class UnsupportedNode(Exception):
    """The engine has no operator for a node; the message says why."""

    def __init__(self, node: ir.Node, reason: str) -> None:
        super().__init__(reason)
        self.node, self.reason = node, reason


@dataclass(eq=False)
class Value:
    """Rows of numbers, one row per token."""

    width: int
    parent: Value | None = None
    """The value that contains this one as columns from `offset` on."""
    offset: int = 0

    def root(self) -> tuple[Value, int]:
        at, value = 0, self
        while value.parent is not None:
            at, value = at + value.offset, value.parent
        return value, at


@dataclass(eq=False)
class Op:
    """An operator before buffers are assigned."""

    kind: str
    dst: Value
    inputs: list[Value] = field(default_factory=list)
    residual: Value | None = None
    weight: Weight | None = None
    vector: Array | None = None
    width: int = 0
    groups: int = 1
    index: int = 0
    act: str = ""
    by: str = "f32"
    scale: float = 1.0
    interleaved: bool = False
    """Whether a rotation works on interleaved pairs."""
    rope: int = -1
    """Rope that attention applies to the keys as it writes them to the cache; -1: they are rotated already."""
    node: str = ""
    """Name of the graph node that it was read from."""
    key: int = 0
    """Products with equal keys share a matrix; 0: not shared."""

    def reads(self) -> Iterator[Value]:
        yield from self.inputs
        if self.residual is not None:
            yield self.residual


class GraphReader:
    """Reads a graph in order.

    Args:
        graph: must be a decoder.
        refused: None, or a dictionary that gets the reason for each node that the engine cannot run by itself, by the
            node's name. Reading then goes on after such a node as if it had run; if there is any, the operators are not
            complete. `unsupported_nodes` is the function for this.

    Raises:
        UnsupportedNode: the engine has no operator for a node; the first such node is reported. Not with `refused`.
    """

    def __init__(self, graph: Graph, kernels: Kernels, refused: dict[str, str] | None = None) -> None:
        assert graph.decoder is not None
        self.graph, self.decoder, self.kernels = graph, graph.decoder, kernels
        self._heads = vocabulary_products(graph)
        self.ops: list[Op] = []
        self.ropes: list[tuple[Array, float]] = []
        self.layers: dict[int, tuple[float, float, Array | None]] = {}
        """Scale, soft cap and sinks of each layer."""
        self._sparsity: dict[int, str] = {}
        self._values: dict[int, Value] = {}
        self._batches: dict[int, Value] = {}
        """Values with a leading axis of size one."""
        self._tables: dict[int, tuple[int, str]] = {}
        """Rope index and function, `"Cos"` or `"Sin"`, of each table."""
        self._constants: set[int] = set()
        self._skipped: set[int] = set()
        inputs = {v.name: v for v in graph.model.graph.inputs}
        self._ids, self._rows, self._positions = (id(inputs[name]) for name in ("input_ids", "logit_rows", "positions"))
        self._unknown: set[int] = set()
        """Values that a refused node would have made, of unknown width."""
        for node in graph.nodes():
            if refused is None:
                self._read(node)
            else:
                self._judge(node, refused)
        if refused:
            return
        (logits,) = (v for v in graph.model.graph.outputs if v.name == "logits")
        last = logits.producer() or next(iter(graph.nodes()))
        if id(logits) not in self._values:
            raise UnsupportedNode(last, "the logits are computed in an unsupported way")
        self.logits = self._values[id(logits)]
        if not any(op.kind == "rows" for op in self.ops):
            raise UnsupportedNode(last, "the graph never selects the rows that need logits")
        self.sparsity = self._policy()

    def _judge(self, node: ir.Node, refused: dict[str, str]) -> None:
        """Read a node; if that fails, note the node's own reason and make up its outputs."""
        if id(node) in self._skipped:
            return
        if any(v is not None and id(v) in self._unknown for v in node.inputs):
            if reason := self._own_reason(node):
                refused[str(node.name)] = reason
            self._make_up(node)
            return
        try:
            self._read(node)
        except UnsupportedNode as e:
            refused.setdefault(str(e.node.name), e.reason)
            self._make_up(node)

    def _own_reason(self, node: ir.Node) -> str:
        """Why the engine cannot run a node whatever its inputs are; empty if there is no such reason."""
        if is_attention(node):
            return self._unable_to_attend(node)
        if node.domain not in ("", "ai.onnx") or node.op_type not in (*_READERS, *_INSIDE):
            return _no_kernel(node)
        if node.op_type == "RMSNormalization":
            return self._unable_to_norm(node)
        weight = linear_weight(node) if node.op_type == "MatMul" else None
        reason = "" if weight is None else self.kernels.matrix(weight)
        return f"no kernel for {reason}" if reason else ""

    def _make_up(self, node: ir.Node) -> None:
        """Note the first output of a node that was not read as rows of their width, and other outputs as unknown."""
        self._unknown |= {id(value) for value in node.outputs}
        width, batches = self._width_of(node), node.op_type in ("Unsqueeze", "RotaryEmbedding")
        if width:
            self._unknown.discard(id(node.outputs[0]))
            (self._batches if batches else self._values)[id(node.outputs[0])] = Value(width)

    def _width_of(self, node: ir.Node) -> int:
        """The width of a node's output; 0 where it is not known."""
        if is_attention(node):
            cache = self.decoder.layers[int(attributes_of(node)["layer"])]
            return cache.q_heads * cache.value_dim
        if node.op_type == "MatMul":
            weight = linear_weight(node)
            return 0 if weight is None else weight.shape[0]
        if node.op_type == "Gather":
            table = weight_of(node.inputs[0])
            if table is not None and len(table.shape) == 2:
                return table.shape[1]
        elif node.op_type not in _SAME_WIDTH:
            return 0
        known = (self._values.get(id(v)) or self._batches.get(id(v)) for v in node.inputs)
        return next((value.width for value in known if value is not None), 0)

    def _policy(self) -> Sparsity:
        """The sparsity policy of all layers."""
        node = next(n for n in self.graph.nodes() if is_attention(n))
        policy = joined([self._sparsity[i] for i in range(len(self.decoder.layers))])
        reason = policy if isinstance(policy, str) else self.kernels.policy(policy)
        if isinstance(policy, str) or reason:
            raise UnsupportedNode(node, reason)
        return policy

    def node(self, op: Op) -> ir.Node:
        """The node that an operator was read from."""
        return next(node for node in self.graph.nodes() if node.name == op.node)

    # values -----------------------------------------------------------------------------------------------------------
    def _value(self, node: ir.Node, index: int) -> Value:
        value = node.inputs[index]
        if value is None or id(value) not in self._values:
            raise UnsupportedNode(node, f"input {index} of {node.op_type} is not a row of numbers for each token")
        return self._values[id(value)]

    def _set(self, node: ir.Node, value: Value) -> None:
        self._values[id(node.outputs[0])] = value

    def _emit(self, node: ir.Node, op: Op) -> None:
        op.width, op.node = op.width or op.dst.width, str(node.name)
        self.ops.append(op)
        self._set(node, op.dst)

    @staticmethod
    def _uses(value: ir.Value | None) -> int:
        return 0 if value is None else len(list(value.uses())) + value.is_graph_output()

    def _vector(self, value: ir.Value | None) -> Array | None:
        """A constant vector in float32: a weight, or a sum or product of constants."""
        if value is None:
            return None
        weight = weight_of(value)
        if weight is not None and weight.shape:
            return dequantize(weight) if isinstance(weight, Dense) else None
        found = constant_of(value)
        if found is not None:
            return np.asarray(found, np.float32)
        node = value.producer()
        if node is None or node.op_type not in ("Add", "Mul") or node.domain:
            return None
        left, right = self._vector(node.inputs[0]), self._vector(node.inputs[1])
        if left is None or right is None:
            return None
        return np.asarray(left + right if node.op_type == "Add" else left * right, np.float32)

    def _scalar(self, value: ir.Value | None) -> float | None:
        found = self._vector(value)
        return float(found.reshape(-1)[0]) if found is not None and found.size == 1 else None

    # nodes ------------------------------------------------------------------------------------------------------------
    def _read(self, node: ir.Node) -> None:
        if id(node) in self._skipped:
            return
        inputs = [v for v in node.inputs if v is not None]
        producers = [v.producer() for v in inputs]
        fixed = all(
            v.const_value is not None or (p is not None and id(p) in self._constants)
            for v, p in zip(inputs, producers, strict=True)
        )
        if (inputs or node.op_type == "Constant") and fixed and node.op_type not in ("If", "Loop", "Scan"):
            self._constants.add(id(node))
            return
        if is_attention(node):
            self._attention(node)
            return
        reader = None if node.domain not in ("", "ai.onnx") else _READERS.get(node.op_type)
        if reader is None:
            raise UnsupportedNode(node, _no_kernel(node))
        reader(self, node)

    def _gather(self, node: ir.Node) -> None:
        index, axis = id(node.inputs[1]), int(attributes_of(node).get("axis", 0))
        weight = weight_of(node.inputs[0])
        if axis == 0 and index == self._ids and weight is not None and len(weight.shape) == 2:
            self._need_packable(node, weight)
            dst = Value(weight.shape[1])
            self._emit(node, Op("embed", dst, weight=weight, key=id(node.inputs[0])))
        elif axis == 0 and index == self._rows:
            x = self._value(node, 0)
            self._emit(node, Op("rows", Value(x.width), [x]))
        else:
            raise UnsupportedNode(node, "a Gather that selects neither token embeddings nor rows of logits")

    def _need_packable(self, node: ir.Node, weight: Weight) -> None:
        if reason := self.kernels.matrix(weight):
            raise UnsupportedNode(node, f"no kernel for {reason}")

    def _unable_to_norm(self, node: ir.Node) -> str:
        """Why there is no kernel for a normalization, whatever its input is; empty if there is one."""
        gain = self._vector(node.inputs[1])
        if gain is None or gain.ndim != 1 or int(attributes_of(node).get("axis", -1)) != -1:
            return "a normalization whose scale is not a constant vector over the last axis"
        if gain.size % self.kernels.tile:
            return f"a normalization over {gain.size} numbers, not a multiple of {self.kernels.tile}"
        return ""

    def _norm(self, node: ir.Node) -> None:
        x, gain = self._value(node, 0), self._vector(node.inputs[1])
        if reason := self._unable_to_norm(node):
            raise UnsupportedNode(node, reason)
        if gain is None or x.width % gain.size:
            raise UnsupportedNode(node, "a normalization whose scale is not a constant vector over the last axis")
        epsilon = float(attributes_of(node).get("epsilon", 1e-5))
        op = Op("norm", Value(x.width), [x], vector=gain, groups=x.width // gain.size, scale=epsilon)
        self._emit(node, op)

    def _matmul(self, node: ir.Node) -> None:
        weight = linear_weight(node)
        if weight is None:
            raise UnsupportedNode(node, "a product of two computed values")
        self._need_packable(node, weight)
        x = self._value(node, 0)
        if x.width != weight.shape[1]:
            raise UnsupportedNode(node, f"a product of {weight.shape[1]} columns with rows of {x.width}")
        transpose = node.inputs[1].producer() if node.inputs[1] is not None else None
        key = id(transpose.inputs[0]) if transpose is not None else 0
        by = self.kernels.by(weight, head=str(node.name) in self._heads)
        op = Op("linear", Value(weight.shape[0]), [x], weight=weight, by=by, key=key)
        self._emit(node, op)

    def _add(self, node: ir.Node) -> None:
        for one, other in ((0, 1), (1, 0)):
            vector = self._vector(node.inputs[other])
            if vector is not None:
                x = self._value(node, one)
                if vector.size != x.width:
                    raise UnsupportedNode(node, f"an addition of {vector.size} constants to rows of {x.width}")
                self._emit(node, Op("bias", Value(x.width), [x], vector=vector.reshape(-1)))
                return
        a, b = self._value(node, 0), self._value(node, 1)
        if a.width != b.width:
            raise UnsupportedNode(node, f"an addition of rows of {a.width} and of {b.width}")
        self._emit(node, Op("add", Value(a.width), [a, b]))

    def _multiply(self, node: ir.Node) -> None:
        for one, other in ((0, 1), (1, 0)):
            factor = self._scalar(node.inputs[other])
            if factor is not None and id(node.inputs[one]) in self._tables:
                index, wave = self._tables[id(node.inputs[one])]
                frequencies, old = self.ropes[index]
                self._tables[id(node.outputs[0])] = self._rope(frequencies, old * factor), wave
                return
            if factor is not None:
                x = self._value(node, one)
                self._emit(node, Op("scale", Value(x.width), [x], scale=factor))
                return
            source = node.inputs[one]
            gate = None if source is None else source.producer()
            if gate is not None and gate.op_type in ("Swish", "Gelu") and id(source) not in self._values:
                a, b = self._value(gate, 0), self._value(node, other)
                self._emit(node, Op("glu", Value(a.width), [a, b], act=self._activation(gate)))
                return
        raise UnsupportedNode(node, "a product of two values that is not a gated activation")

    def _activate(self, node: ir.Node) -> None:
        self._value(node, 0)
        self._activation(node)
        uses = [use.node for use in node.outputs[0].uses()]
        if len(uses) != 1 or uses[0].op_type != "Mul" or self._uses(node.outputs[0]) != 1:
            raise UnsupportedNode(node, "an activation that gates nothing")

    @staticmethod
    def _activation(node: ir.Node) -> str:
        attributes = attributes_of(node)
        if node.op_type == "Swish":
            if float(attributes.get("alpha", 1.0)) != 1.0:
                raise UnsupportedNode(node, "a Swish with a factor inside")
            return "silu"
        return "gelu_tanh" if attributes.get("approximate", "none") == "tanh" else "gelu"

    def _divide(self, node: ir.Node) -> None:
        """The first third of cap * tanh(x / cap), or a division by a constant."""
        by = self._scalar(node.inputs[1])
        if by is None or by == 0:
            raise UnsupportedNode(node, "a division by a value that is not constant")
        x = self._value(node, 0)
        tanh = self._only_use(node, "Tanh")
        product = self._only_use(tanh, "Mul") if tanh is not None else None
        if tanh is not None and product is not None:
            factors = [self._scalar(v) for v in product.inputs]
            if by in factors:
                self._skipped |= {id(tanh), id(product)}
                self._emit(product, Op("softcap", Value(x.width), [x], scale=by))
                return
        self._emit(node, Op("scale", Value(x.width), [x], scale=1.0 / by))

    def _round(self, node: ir.Node) -> None:
        """A round trip through E4M3: quantized and dequantized with the same scale."""
        back = self._only_use(node, "DequantizeLinear")
        x, scale = self._value(node, 0), self._scalar(node.inputs[1])
        if back is None or scale is None or not self.kernels.float8 or back.inputs[1] is not node.inputs[1]:
            raise UnsupportedNode(node, "a value that is rounded to 8 bits before a product")
        code = element_type(node.inputs[2]) if len(node.inputs) > 2 else None
        if code is not FLOAT8:
            raise UnsupportedNode(node, "a value that is rounded to a type other than E4M3")
        self._skipped.add(id(back))
        self._emit(back, Op("round", Value(x.width), [x], scale=scale))

    def _only_use(self, node: ir.Node, op_type: str) -> ir.Node | None:
        uses = [use.node for use in node.outputs[0].uses()]
        one = len(uses) == 1 and self._uses(node.outputs[0]) == 1 and uses[0].op_type == op_type
        return uses[0] if one else None

    def _reshape(self, node: ir.Node) -> None:
        """Another shape of the same rows: heads in an axis of their own, or concatenated."""
        shape = constant_of(node.inputs[1])
        if shape is None or shape.reshape(-1)[0] != 0 or int(attributes_of(node).get("allowzero", 0)):
            raise UnsupportedNode(node, "a Reshape that may move numbers from token to token")
        self._set(node, self._value(node, 0))

    def _unsqueeze(self, node: ir.Node) -> None:
        """Adds the batch axis of size one that a rotation needs."""
        self._need_first_axis(node)
        self._batches[id(node.outputs[0])] = self._value(node, 0)

    def _squeeze(self, node: ir.Node) -> None:
        self._need_first_axis(node)
        x = self._batches.get(id(node.inputs[0]))
        if x is None:
            raise UnsupportedNode(node, "a Squeeze of a value that is not a batch of one")
        self._set(node, x)

    @staticmethod
    def _need_first_axis(node: ir.Node) -> None:
        axes = constant_of(node.inputs[1]) if len(node.inputs) > 1 else None
        if axes is None or axes.reshape(-1).tolist() != [0]:
            raise UnsupportedNode(node, f"a {node.op_type} of axes other than the first")

    def _cast(self, node: ir.Node) -> None:
        """positions → Cast → Unsqueeze → Mul by frequencies → Cos and Sin: the tables of one or several ropes."""
        if id(node.inputs[0]) != self._positions or int(attributes_of(node).get("to", 0)) != FLOAT:
            raise UnsupportedNode(node, "a cast of values other than positions, or not to float32")
        for column in self._only_users(node, "Unsqueeze"):
            axes = constant_of(column.inputs[1])
            if axes is None or axes.reshape(-1).tolist() != [0, 2]:
                raise UnsupportedNode(column, "positions that are not a column of a table")
            for product in self._only_users(column, "Mul"):
                frequencies = next((f for v in product.inputs if (f := self._vector(v)) is not None), None)
                if frequencies is None or frequencies.shape != (1, 1, frequencies.size):
                    raise UnsupportedNode(product, "positions that are not multiplied by a row of frequencies")
                rope = self._rope(frequencies.reshape(-1), 1.0)
                for wave in self._only_users(product, "Cos", "Sin"):
                    self._tables[id(wave.outputs[0])] = rope, wave.op_type

    def _only_users(self, node: ir.Node, *op_types: str) -> list[ir.Node]:
        """The nodes that read a node's output, all of these types. Marks them as read together with it."""
        users = list(dict.fromkeys(use.node for use in node.outputs[0].uses()))
        other = next((user for user in users if user.op_type not in op_types), None)
        if other is not None or node.outputs[0].is_graph_output():
            raise UnsupportedNode(other or node, "positions used for something other than a rotary table")
        self._skipped |= {id(user) for user in users}
        return users

    def rotations(self, rope: int, positions: int) -> tuple[Array, Array]:
        """Cosines and sines of a rope at positions 0 …, float64 [positions, pairs]."""
        frequencies, factor = self.ropes[rope]
        angles = np.arange(positions)[:, None] * np.asarray(frequencies, np.float64)[None]
        return np.cos(angles) * factor, np.sin(angles) * factor

    def _rope(self, frequencies: Array, factor: float) -> int:
        for i, (known, scale) in enumerate(self.ropes):
            if scale == factor and np.array_equal(known, frequencies):
                return i
        self.ropes.append((frequencies, factor))
        return len(self.ropes) - 1

    def _rotate(self, node: ir.Node) -> None:
        x, attributes = self._batches.get(id(node.inputs[0])), attributes_of(node)
        if x is None:
            raise UnsupportedNode(node, "a rotation of a value that is not a batch of one")
        cos, sin = (None if v is None else self._tables.get(id(v)) for v in node.inputs[1:3])
        if len(node.inputs) > 3 or cos is None or sin is None or (*cos, *sin) != (cos[0], "Cos", cos[0], "Sin"):
            raise UnsupportedNode(node, "a rotation by tables other than cosines and sines of positions")
        heads = int(attributes.get("num_heads", 0))
        interleaved = bool(attributes.get("interleaved", 0))
        if (interleaved and not self.kernels.interleaved) or not heads or x.width // heads % self.kernels.tile:
            tile = self.kernels.tile
            reason = f"a rotation of interleaved pairs, or of heads whose width is not a multiple of {tile}"
            raise UnsupportedNode(node, reason)
        turned = int(attributes.get("rotary_embedding_dim", 0)) or x.width // heads
        if turned != 2 * self.ropes[cos[0]][0].size:
            raise UnsupportedNode(node, f"a rotation of {turned} columns by {self.ropes[cos[0]][0].size} frequencies")
        op = Op("rope", Value(x.width), [x], groups=heads, index=cos[0], interleaved=interleaved)
        op.width = x.width
        self.ops.append(op)
        self._batches[id(node.outputs[0])] = op.dst

    def _unable_to_attend(self, node: ir.Node) -> str:
        """Why the kernels cannot compute this attention, whatever its inputs are; empty if they can."""
        attributes = attributes_of(node)
        if reason := unpageable_reason(self.graph, node):
            return reason
        if len(node.inputs) > 9 and node.inputs[9] is not None:
            return "the attention kernels take no additive bias"
        if not int(attributes["is_causal"]):
            return "the attention kernels are causal"
        cache = self.decoder.layers[int(attributes["layer"])]
        for dim in (cache.head_dim, cache.value_dim):
            tile, most = self.kernels.tile, self.kernels.largest_head
            if dim % tile or not 0 < dim <= most:
                return f"heads of {dim} columns; kernels need a multiple of {tile} up to {most}"
        if cache.q_heads > self.kernels.largest_group * cache.kv_heads:
            group, largest = cache.q_heads // cache.kv_heads, self.kernels.largest_group
            return f"{group} query heads per KV head; kernels support up to {largest}"
        return ""

    def _attention(self, node: ir.Node) -> None:
        if reason := self._unable_to_attend(node):
            raise UnsupportedNode(node, reason)
        attributes = attributes_of(node)
        layer = int(attributes["layer"])
        cache = self.decoder.layers[layer]
        sinks = self._vector(node.inputs[10]) if len(node.inputs) > 10 else None
        scale = float(attributes["scale"]) or cache.head_dim**-0.5
        self.layers[layer] = (scale, float(attributes["softcap"]), sinks)
        self._sparsity[layer] = str(attributes["sparsity"])
        q, k, v = (self._value(node, i) for i in range(3))
        self._emit(node, Op("attend", Value(cache.q_heads * cache.value_dim), [q, k, v], index=layer))


_READERS: dict[str, Callable[[GraphReader, ir.Node], None]] = {
    "Gather": GraphReader._gather,
    "RMSNormalization": GraphReader._norm,
    "MatMul": GraphReader._matmul,
    "Add": GraphReader._add,
    "Mul": GraphReader._multiply,
    "Div": GraphReader._divide,
    "Swish": GraphReader._activate,
    "Gelu": GraphReader._activate,
    "Reshape": GraphReader._reshape,
    "Unsqueeze": GraphReader._unsqueeze,
    "Squeeze": GraphReader._squeeze,
    "Cast": GraphReader._cast,
    "RotaryEmbedding": GraphReader._rotate,
    "QuantizeLinear": GraphReader._round,
}
_SAME_WIDTH = ("RMSNormalization", "Add", "Mul", "Div", "Reshape", "Unsqueeze", "Squeeze", "RotaryEmbedding")
"""Operators whose outputs are as wide as their inputs, and that may be read as rows without being read themselves."""
_INSIDE = ("Cos", "Sin", "Tanh", "DequantizeLinear")
"""Operators that are read together with the node before them."""


def _no_kernel(node: ir.Node) -> str:
    return f"no kernel for {node.domain + '::' if node.domain else ''}{node.op_type}"


def unsupported_nodes(graph: Graph, kernels: Kernels) -> dict[str, str]:
    """Every node that the engine cannot run, by name, with its own reason; empty if the engine runs the graph.

    A node whose only fault is that it reads the output of such a node is not among them.
    """
    refused: dict[str, str] = {}
    try:
        GraphReader(graph, kernels, refused)
    except UnsupportedNode as e:  # the graph as a whole; of attention its policy
        attention = [n for n in graph.nodes() if is_attention(n)] if is_attention(e.node) else []
        sparse = [n for n in attention if n.attributes.get_string("sparsity", "dense") != "dense"]
        refused |= {str(node.name): e.reason for node in sparse or [e.node]}
    return refused
