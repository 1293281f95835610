"""From a neutral decoder graph to a program: one value after another, then what can be made together, then buffers.

A node that has no operator here is a reason to leave the whole graph to OpenVINO: a program is all or nothing, since
every border between two engines costs a copy of the activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from transom.graph.reading import attributes_of, constant_of, weight_of
from transom.graph.weights import Array, Blocked, Dense, Weight, concat_rows, dequantize, take_rows
from transom.signature import cache_input_names, cache_output_names
from transom_openvino_cpu.claims import is_cached_attention, linear_weight
from transom_openvino_cpu.native import packing
from transom_openvino_cpu.native.packing import TILE
from transom_openvino_cpu.native.policies import joined, unsupported
from transom_openvino_cpu.native.program import NOWHERE, Buffer, Layer, Op, Program, Rope, View

if TYPE_CHECKING:
    import onnx_ir as ir

    from transom.graph import Graph
    from transom.sparsity import Sparsity
    from transom_openvino_cpu.precision import Precision

LARGEST_HEAD = 256
"""Columns of a head."""
LARGEST_GROUP = 64
"""Query heads of a KV head."""
BARRIERS = ("attend", "rows")
"""Operators that look at other tokens than their own."""


class NoForm(Exception):
    """The library has no form of a node; the message says which and why."""

    def __init__(self, node: ir.Node, reason: str) -> None:
        super().__init__(reason)
        self.node, self.reason = node, reason


@dataclass(eq=False)
class Value:
    """Rows of numbers, one row for each token."""

    width: int
    parent: Value | None = None
    """The value that this one is some columns of, from `offset` on."""
    offset: int = 0

    def root(self) -> tuple[Value, int]:
        at, value = 0, self
        while value.parent is not None:
            at, value = at + value.offset, value.parent
        return value, at


@dataclass(eq=False)
class Draft:
    """An operator before its buffers are known."""

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
    key: int = 0
    """Products with equal keys share a matrix; 0: shared with nobody."""

    def reads(self) -> Iterator[Value]:
        yield from self.inputs
        if self.residual is not None:
            yield self.residual


class Drafting:
    """Reads a graph in order.

    Raises:
        NoForm: on the first node that the library has no operator for.
    """

    def __init__(self, graph: Graph, precision: Precision) -> None:
        assert graph.decoder is not None
        self.graph, self.decoder, self.precision = graph, graph.decoder, precision
        self.drafts: list[Draft] = []
        self.ropes: list[tuple[Array, float]] = []
        self.layers: dict[int, tuple[float, float, Array | None]] = {}
        """Scale, soft cap and sinks of each layer."""
        self._sparsity: dict[int, str] = {}
        self._values: dict[int, Value] = {}
        self._batches: dict[int, Value] = {}
        """Values with an axis of one in front."""
        self._tables: dict[int, int] = {}
        self._constants: set[int] = set()
        self._skipped: set[int] = set()
        inputs = {v.name: v for v in graph.model.graph.inputs}
        self._ids, self._rows, self._positions = (id(inputs[name]) for name in ("input_ids", "logit_rows", "positions"))
        for node in graph.nodes():
            self._read(node)
        (logits,) = (v for v in graph.model.graph.outputs if v.name == "logits")
        if id(logits) not in self._values:
            raise NoForm(next(iter(graph.nodes())), "the logits are computed in a way that is not known here")
        self.logits = self._values[id(logits)]
        self.sparsity = self._policy()

    def _policy(self) -> Sparsity:
        """The sparsity policy of all layers."""
        node = next(n for n in self.graph.nodes() if is_cached_attention(n))
        policy = joined([self._sparsity[i] for i in range(len(self.decoder.layers))])
        reason = policy if isinstance(policy, str) else unsupported(policy)
        if isinstance(policy, str) or reason:
            raise NoForm(node, reason)
        return policy

    # values -----------------------------------------------------------------------------------------------------------
    def _value(self, node: ir.Node, index: int) -> Value:
        value = node.inputs[index]
        if value is None or id(value) not in self._values:
            raise NoForm(node, f"input {index} of {node.op_type} is no row of numbers for each token")
        return self._values[id(value)]

    def _set(self, node: ir.Node, value: Value) -> None:
        self._values[id(node.outputs[0])] = value

    def _emit(self, node: ir.Node, draft: Draft) -> None:
        draft.width = draft.width or draft.dst.width
        self.drafts.append(draft)
        self._set(node, draft.dst)

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
        if is_cached_attention(node):
            self._attention(node)
            return
        reader = None if node.domain not in ("", "ai.onnx") else _READERS.get(node.op_type)
        if reader is None:
            raise NoForm(node, f"no native form of {node.domain + '::' if node.domain else ''}{node.op_type}")
        reader(self, node)

    def _gather(self, node: ir.Node) -> None:
        index, axis = id(node.inputs[1]), int(attributes_of(node).get("axis", 0))
        weight = weight_of(node.inputs[0])
        if axis == 0 and index == self._ids and weight is not None and len(weight.shape) == 2:
            self._need_packable(node, weight)
            dst = Value(weight.shape[1])
            self._emit(node, Draft("embed", dst, weight=weight, key=id(node.inputs[0])))
        elif axis == 0 and index == self._rows:
            x = self._value(node, 0)
            self._emit(node, Draft("rows", Value(x.width), [x]))
        else:
            raise NoForm(node, "a Gather that chooses neither token embeddings nor rows of logits")

    def _need_packable(self, node: ir.Node, weight: Weight) -> None:
        if reason := packing.packable(weight):
            raise NoForm(node, f"no native form of {reason}")

    def _norm(self, node: ir.Node) -> None:
        x, attributes = self._value(node, 0), attributes_of(node)
        gain = self._vector(node.inputs[1])
        if gain is None or gain.ndim != 1 or int(attributes.get("axis", -1)) != -1 or x.width % gain.size:
            raise NoForm(node, "a normalisation whose scale is no constant vector over the last axis")
        if gain.size % TILE:
            raise NoForm(node, f"a normalisation over {gain.size} numbers, which is no multiple of {TILE}")
        epsilon = float(attributes.get("epsilon", 1e-5))
        draft = Draft("norm", Value(x.width), [x], vector=gain, groups=x.width // gain.size, scale=epsilon)
        self._emit(node, draft)

    def _matmul(self, node: ir.Node) -> None:
        weight = linear_weight(node)
        if weight is None:
            raise NoForm(node, "a product of two values that are computed")
        self._need_packable(node, weight)
        x = self._value(node, 0)
        if x.width != weight.shape[1]:
            raise NoForm(node, f"a product of {weight.shape[1]} columns with rows of {x.width}")
        head = weight.shape[0] == self.decoder.vocabulary
        transpose = node.inputs[1].producer() if node.inputs[1] is not None else None
        key = id(transpose.inputs[0]) if transpose is not None else 0
        draft = Draft("linear", Value(weight.shape[0]), [x], weight=weight, by=self._by(weight, head), key=key)
        self._emit(node, draft)

    def _by(self, weight: Weight, head: bool) -> str:
        """In what numbers activations meet the matrix. The vocabulary matrix always meets floats."""
        to_int8 = self.precision.dense_to_int8 and weight.shape[1] % packing.SMALLEST_BLOCK == 0
        if self.precision.dynamic and not head and (isinstance(weight, Blocked) or to_int8):
            return "int8"
        if self.precision.hint == "bf16" and isinstance(weight, Dense) and not head:
            return "bf16"
        return "f32"

    def _add(self, node: ir.Node) -> None:
        for one, other in ((0, 1), (1, 0)):
            vector = self._vector(node.inputs[other])
            if vector is not None:
                x = self._value(node, one)
                if vector.size != x.width:
                    raise NoForm(node, f"an addition of {vector.size} constants to rows of {x.width}")
                self._emit(node, Draft("bias", Value(x.width), [x], vector=vector.reshape(-1)))
                return
        a, b = self._value(node, 0), self._value(node, 1)
        if a.width != b.width:
            raise NoForm(node, f"an addition of rows of {a.width} and of {b.width}")
        self._emit(node, Draft("add", Value(a.width), [a, b]))

    def _multiply(self, node: ir.Node) -> None:
        for one, other in ((0, 1), (1, 0)):
            factor = self._scalar(node.inputs[other])
            if factor is not None and id(node.inputs[one]) in self._tables:
                index = self._tables[id(node.inputs[one])]
                frequencies, old = self.ropes[index]
                self._tables[id(node.outputs[0])] = self._rope(frequencies, old * factor)
                return
            if factor is not None:
                self._emit(
                    node, Draft("scale", Value(self._value(node, one).width), [self._value(node, one)], scale=factor)
                )
                return
            source = node.inputs[one]
            gate = None if source is None else source.producer()
            if gate is not None and gate.op_type in ("Swish", "Gelu") and id(source) not in self._values:
                a, b = self._value(gate, 0), self._value(node, other)
                self._emit(node, Draft("glu", Value(a.width), [a, b], act=self._activation(gate)))
                return
        raise NoForm(node, "a product of two values that is no gated activation")

    def _activate(self, node: ir.Node) -> None:
        self._value(node, 0)
        self._activation(node)
        uses = [use.node for use in node.outputs[0].uses()]
        if len(uses) != 1 or uses[0].op_type != "Mul" or self._uses(node.outputs[0]) != 1:
            raise NoForm(node, "an activation that gates nothing")

    @staticmethod
    def _activation(node: ir.Node) -> str:
        attributes = attributes_of(node)
        if node.op_type == "Swish":
            if float(attributes.get("alpha", 1.0)) != 1.0:
                raise NoForm(node, "a Swish with a factor inside")
            return "silu"
        return "gelu_tanh" if attributes.get("approximate", "none") == "tanh" else "gelu"

    def _divide(self, node: ir.Node) -> None:
        """The first third of cap * tanh(x / cap), or a division by a constant."""
        by = self._scalar(node.inputs[1])
        if by is None or by == 0:
            raise NoForm(node, "a division by what is no constant")
        x = self._value(node, 0)
        tanh = self._only_use(node, "Tanh")
        product = self._only_use(tanh, "Mul") if tanh is not None else None
        if tanh is not None and product is not None:
            factors = [self._scalar(v) for v in product.inputs]
            if by in factors:
                self._skipped |= {id(tanh), id(product)}
                self._emit(product, Draft("softcap", Value(x.width), [x], scale=by))
                return
        self._emit(node, Draft("scale", Value(x.width), [x], scale=1.0 / by))

    def _only_use(self, node: ir.Node, op_type: str) -> ir.Node | None:
        uses = [use.node for use in node.outputs[0].uses()]
        one = len(uses) == 1 and self._uses(node.outputs[0]) == 1 and uses[0].op_type == op_type
        return uses[0] if one else None

    def _reshape(self, node: ir.Node) -> None:
        """Another shape of the same rows: heads side by side, or one behind the other."""
        shape = constant_of(node.inputs[1])
        if shape is None or shape.reshape(-1)[0] != 0 or int(attributes_of(node).get("allowzero", 0)):
            raise NoForm(node, "a Reshape that may move numbers from token to token")
        self._set(node, self._value(node, 0))

    def _unsqueeze(self, node: ir.Node) -> None:
        """A batch of one around the tokens, which a rotation wants."""
        self._need_first_axis(node)
        self._batches[id(node.outputs[0])] = self._value(node, 0)

    def _squeeze(self, node: ir.Node) -> None:
        self._need_first_axis(node)
        x = self._batches.get(id(node.inputs[0]))
        if x is None:
            raise NoForm(node, "a Squeeze of what is no batch of one")
        self._set(node, x)

    @staticmethod
    def _need_first_axis(node: ir.Node) -> None:
        axes = constant_of(node.inputs[1]) if len(node.inputs) > 1 else None
        if axes is None or axes.reshape(-1).tolist() != [0]:
            raise NoForm(node, f"a {node.op_type} of other axes than the first")

    def _cast(self, node: ir.Node) -> None:
        if id(node.inputs[0]) != self._positions:
            raise NoForm(node, "a cast of what are no positions")
        self._tables_from(node)

    def _tables_from(self, node: ir.Node) -> None:
        """positions → Cast → Unsqueeze → Mul by frequencies → Cos and Sin: a rotary table."""
        column = self._only_use(node, "Unsqueeze")
        angles = self._only_use(node if column is None else column, "Mul")
        # One column may serve several sets of frequencies.
        source = node if column is None else column
        products = [angles] if angles is not None else [use.node for use in source.outputs[0].uses()]
        if column is None:
            columns = [use.node for use in node.outputs[0].uses()]
            products = [use.node for c in columns if c.op_type == "Unsqueeze" for use in c.outputs[0].uses()]
            self._skipped |= {id(c) for c in columns if c.op_type == "Unsqueeze"}
        else:
            self._skipped.add(id(column))
        for product in products:
            frequencies = next((f for v in product.inputs if (f := self._vector(v)) is not None), None)
            if product.op_type != "Mul" or frequencies is None:
                raise NoForm(product, "positions that lead to no rotary table")
            self._skipped.add(id(product))
            for use in product.outputs[0].uses():
                wave = use.node
                if wave.op_type not in ("Cos", "Sin"):
                    raise NoForm(wave, "positions that lead to no rotary table")
                self._skipped.add(id(wave))
                self._tables[id(wave.outputs[0])] = self._rope(frequencies.reshape(-1), 1.0)

    def _rope(self, frequencies: Array, factor: float) -> int:
        for i, (known, scale) in enumerate(self.ropes):
            if scale == factor and np.array_equal(known, frequencies):
                return i
        self.ropes.append((frequencies, factor))
        return len(self.ropes) - 1

    def _rotate(self, node: ir.Node) -> None:
        x, attributes = self._batches.get(id(node.inputs[0])), attributes_of(node)
        if x is None:
            raise NoForm(node, "a rotation of what is no batch of one")
        tables = [None if v is None else self._tables.get(id(v)) for v in node.inputs[1:3]]
        if len(node.inputs) > 3 or tables[0] is None or tables[0] != tables[1]:
            raise NoForm(node, "a rotation by tables that positions do not lead to")
        heads = int(attributes.get("num_heads", 0))
        if int(attributes.get("interleaved", 0)) or not heads or x.width // heads % TILE:
            raise NoForm(node, "a rotation of interleaved pairs, or of heads that are no multiple of 16 wide")
        draft = Draft("rope", Value(x.width), [x], width=x.width, groups=heads, index=tables[0])
        self.drafts.append(draft)
        self._batches[id(node.outputs[0])] = draft.dst

    def _attention(self, node: ir.Node) -> None:
        attributes = attributes_of(node)
        layer = int(attributes["layer"])
        if reason := unpageable(self.graph, node):
            raise NoForm(node, reason)
        cache = self.decoder.layers[layer]
        for dim in (cache.head_dim, cache.value_dim):
            if dim % TILE or not 0 < dim <= LARGEST_HEAD:
                raise NoForm(node, f"heads of {dim} columns: a multiple of {TILE} up to {LARGEST_HEAD} is needed")
        if cache.q_heads > LARGEST_GROUP * cache.kv_heads:
            group = cache.q_heads // cache.kv_heads
            raise NoForm(node, f"{group} query heads of a KV head: it has up to {LARGEST_GROUP}")
        sinks = self._vector(node.inputs[10]) if len(node.inputs) > 10 else None
        scale = float(attributes["scale"]) or cache.head_dim**-0.5
        self.layers[layer] = (scale, float(attributes["softcap"]), sinks)
        self._sparsity[layer] = str(attributes["sparsity"])
        q, k, v = (self._value(node, i) for i in range(3))
        self._emit(node, Draft("attend", Value(cache.q_heads * cache.value_dim), [q, k, v], index=layer))


_READERS: dict[str, Callable[[Drafting, ir.Node], None]] = {
    "Gather": Drafting._gather,
    "RMSNormalization": Drafting._norm,
    "MatMul": Drafting._matmul,
    "Add": Drafting._add,
    "Mul": Drafting._multiply,
    "Div": Drafting._divide,
    "Swish": Drafting._activate,
    "Gelu": Drafting._activate,
    "Reshape": Drafting._reshape,
    "Unsqueeze": Drafting._unsqueeze,
    "Squeeze": Drafting._squeeze,
    "Cast": Drafting._cast,
    "RotaryEmbedding": Drafting._rotate,
}


def unpageable(graph: Graph, node: ir.Node) -> str:
    """Why this attention cannot run over our pages; empty if it can."""
    decoder = graph.decoder
    layer = node.attributes.get_int("layer", 0)
    if decoder is None or layer >= len(decoder.layers):
        return "the cache is no input of a decoder graph, so it cannot be kept in pages"
    wired = [None if v is None else v.name for v in node.inputs]
    if tuple(wired[3:5]) != cache_input_names(layer) or wired[5:7] != ["sequences", "positions"]:
        return "the cache or the positions are computed in the graph, so they cannot be kept in pages"
    outputs = {str(v.name) for v in graph.model.graph.outputs}
    for value, wanted in zip(node.outputs[1:], cache_output_names(layer), strict=False):
        if value.uses() or (value.name != wanted and value.name in outputs):
            return "the cache is read again in the graph"
    if len(node.inputs) > 9 and node.inputs[9] is not None:
        return "the native attention takes no additive bias"
    if not node.attributes.get_int("is_causal", 1):
        return "the native attention is causal"
    return ""


# what can be made together -------------------------------------------------------------------------------------------
def fuse(drafting: Drafting) -> list[Draft]:
    """The same program in fewer operators: residuals and biases inside products, products of one input together,
    gates and rotations without a copy."""
    drafts = list(drafting.drafts)
    drafts = _fuse_scales(drafts)
    drafts = _fuse_biases(drafts)
    drafts = _fuse_gates(drafts)
    drafts = _fuse_residuals(drafts)
    drafts = _fuse_same_input(drafts)
    return _in_place(drafts, drafting.logits)


def _readers(drafts: Sequence[Draft]) -> dict[int, list[Draft]]:
    found: dict[int, list[Draft]] = {}
    for draft in drafts:
        for value in draft.reads():
            found.setdefault(id(value), []).append(draft)
    return found


def _maker(drafts: Sequence[Draft]) -> dict[int, Draft]:
    return {id(d.dst): d for d in drafts}


def _fuse_scales(drafts: list[Draft]) -> list[Draft]:
    makers, readers = _maker(drafts), _readers(drafts)
    done: set[int] = set()
    for draft in drafts:
        source = makers.get(id(draft.inputs[0])) if draft.kind == "scale" else None
        if source is not None and source.kind == "embed" and len(readers[id(source.dst)]) == 1:
            source.scale, source.dst = source.scale * draft.scale, draft.dst
            done.add(id(draft))
    return [d for d in drafts if id(d) not in done]


def _fuse_biases(drafts: list[Draft]) -> list[Draft]:
    makers, readers = _maker(drafts), _readers(drafts)
    done: set[int] = set()
    for draft in drafts:
        source = makers.get(id(draft.inputs[0])) if draft.kind == "bias" else None
        if source is not None and source.kind == "linear" and len(readers[id(source.dst)]) == 1:
            source.vector, source.dst = draft.vector, draft.dst
            done.add(id(draft))
    return [d for d in drafts if id(d) not in done]


def _fuse_gates(drafts: list[Draft]) -> list[Draft]:
    """act(gate(x)) * up(x): one product, whose rows come 16 of one matrix and 16 of the other in turn."""
    makers, readers = _maker(drafts), _readers(drafts)
    done: set[int] = set()
    for i, draft in enumerate(drafts):
        if draft.kind != "glu":
            continue
        gate, up = (makers.get(id(v)) for v in draft.inputs)
        if gate is None or up is None or gate is up or gate.kind != "linear" or up.kind != "linear":
            continue
        alone = all(len(readers[id(d.dst)]) == 1 and d.vector is None and d.residual is None for d in (gate, up))
        if not alone or gate.inputs[0] is not up.inputs[0] or gate.by != up.by or gate.dst.width % TILE:
            continue
        assert gate.weight is not None
        assert up.weight is not None
        both = concat_rows([gate.weight, up.weight])
        if both is None or gate.weight.shape != up.weight.shape:
            continue
        rows = np.arange(2 * gate.dst.width).reshape(2, -1, TILE).swapaxes(0, 1).reshape(-1)
        drafts[i] = Draft(
            "linear", draft.dst, [gate.inputs[0]], weight=take_rows(both, rows), width=draft.dst.width, act=draft.act,
            by=gate.by,
        )  # fmt: skip
        done |= {id(gate), id(up)}
    return [d for d in drafts if id(d) not in done]


def _fuse_residuals(drafts: list[Draft]) -> list[Draft]:
    makers, readers = _maker(drafts), _readers(drafts)
    order = {id(d.dst): i for i, d in enumerate(drafts)}
    done: set[int] = set()
    for draft in drafts:
        if draft.kind != "add":
            continue
        for product, other in (draft.inputs, draft.inputs[::-1]):
            source = makers.get(id(product))
            fits = source is not None and source.kind == "linear" and not source.act and source.residual is None
            if not fits or source is None or len(readers[id(product)]) != 1:
                continue
            if order.get(id(other), -1) < order[id(product)] and other is not product:
                source.residual, source.dst = other, draft.dst
                order[id(draft.dst)] = order[id(product)]
                makers[id(draft.dst)] = source
                done.add(id(draft))
                break
    return [d for d in drafts if id(d) not in done]


def _fuse_same_input(drafts: list[Draft]) -> list[Draft]:
    """Products of one input, one after another with nothing but each other's rotations between, as one product."""
    groups: dict[tuple[int, str], list[Draft]] = {}
    for draft in drafts:
        if draft.kind == "linear" and not draft.act and draft.residual is None and draft.dst.width % TILE == 0:
            groups.setdefault((id(draft.inputs[0]), draft.by), []).append(draft)
    done: set[int] = set()
    instead: dict[int, Draft] = {}
    for members in groups.values():
        weights = [d.weight for d in members if d.weight is not None]
        joined = concat_rows(weights) if len(members) > 1 else None
        if joined is None or len({d.vector is None for d in members}) > 1:
            continue
        whole = Value(joined.shape[0])
        vectors = [d.vector for d in members if d.vector is not None]
        vector = np.concatenate(vectors) if vectors else None
        at = 0
        for member in members:
            member.dst.parent, member.dst.offset = whole, at
            at += member.dst.width
        first = members[0]
        instead[id(first)] = Draft("linear", whole, first.inputs, weight=joined, vector=vector, width=at, by=first.by)
        done |= {id(d) for d in members[1:]}
    return [instead.get(id(d), d) for d in drafts if id(d) not in done]


def _in_place(drafts: list[Draft], logits: Value) -> list[Draft]:
    """Rotations always, other operators on rows where nobody else reads their input, write over it."""
    out: list[Draft] = []
    readers = _readers(drafts)
    for draft in drafts:
        if draft.kind in ("rope", "norm", "softcap", "scale", "bias"):
            x = draft.inputs[0]
            alone = len(readers[id(x)]) == 1
            if draft.kind == "rope" and not alone:
                copy = Value(x.width)
                out.append(Draft("scale", copy, [x], width=x.width))
                draft.inputs[0] = x = copy
                alone = True
            wanted = draft.kind == "rope" or x.root()[0] is not x or draft.dst is logits
            if alone and wanted and draft.dst.parent is None and draft.dst is not x:
                draft.dst.parent, draft.dst.offset = x, 0
        out.append(draft)
    return out


# buffers --------------------------------------------------------------------------------------------------------------
class _Buffers:
    """Gives values their place: a buffer of the same width that nobody needs any more, or a new one."""

    def __init__(self, drafts: Sequence[Draft], logits: Value) -> None:
        self.buffers: list[Buffer] = []
        self._at: dict[int, int] = {}
        self._free: dict[tuple[int, bool], list[int]] = {}
        self._last: dict[int, int] = {}
        self._local: dict[int, bool] = {}
        self._logits = logits.root()[0]
        self.output = self._new(self._logits.width, local=False)
        self._at[id(self._logits)] = self.output
        segment = 0
        segments: dict[int, set[int]] = {}
        for i, draft in enumerate(drafts):
            barrier = draft.kind in BARRIERS
            for value in (*draft.reads(), draft.dst):
                root = id(value.root()[0])
                self._last[root] = i
                segments.setdefault(root, set()).add(-1 if barrier else segment)
            segment += barrier
        self._local = {root: len(used) == 1 and -1 not in used for root, used in segments.items()}

    def _new(self, width: int, *, local: bool) -> int:
        self.buffers.append(Buffer(width, local))
        return len(self.buffers) - 1

    def view(self, value: Value) -> View:
        root, offset = value.root()
        if id(root) not in self._at:
            local = self._local[id(root)]
            free = self._free.get((root.width, local))
            self._at[id(root)] = free.pop() if free else self._new(root.width, local=local)
        return View(self._at[id(root)], offset)

    def done(self, index: int, values: Sequence[Value]) -> None:
        """The operator `index` has run: what it read last is free."""
        for value in {id(v.root()[0]): v.root()[0] for v in values}.values():
            if self._last[id(value)] == index and value is not self._logits:
                self._free.setdefault((value.width, self._local[id(value)]), []).append(self._at[id(value)])


def write(drafting: Drafting, file: BinaryIO, progress: Callable[[float], None]) -> Program:
    """The finished program, its weights in `file`."""
    drafts = fuse(drafting)
    buffers = _Buffers(drafts, drafting.logits)
    matrices: list[packing.Packed] = []
    known: dict[tuple[int, str], int] = {}
    vectors: dict[bytes, int] = {}

    def vector(array: Array | None) -> int:
        if array is None:
            return -1
        key = np.asarray(array, np.float32).tobytes()
        if key not in vectors:
            vectors[key] = packing.write_vector(file, array)
        return vectors[key]

    def matrix(draft: Draft) -> int:
        assert draft.weight is not None
        # A table that is read both as an embedding and as the vocabulary matrix lies in the file once.
        key = (draft.key or -id(draft), draft.by if draft.by != "f32" else "")
        if key not in known:
            known[key] = len(matrices)
            to_int8 = draft.by == "int8" and isinstance(draft.weight, Dense)
            matrices.append(packing.write_matrix(file, draft.weight, narrow=draft.by == "bf16", to_int8=to_int8))
        return known[key]

    ops: list[Op] = []
    for i, draft in enumerate(drafts):
        progress(i / len(drafts))
        inputs = [buffers.view(v) for v in draft.inputs] + [NOWHERE] * 3
        residual = NOWHERE if draft.residual is None else buffers.view(draft.residual)
        dst = buffers.view(draft.dst)
        ops.append(
            Op(
                draft.kind, draft.width or draft.dst.width, dst, inputs[0],
                residual if draft.kind == "linear" else inputs[1], inputs[2],
                matrix(draft) if draft.weight is not None else -1,
                draft.groups, draft.index, draft.act, draft.by, draft.scale, vector(draft.vector),
            )
        )  # fmt: skip
        buffers.done(i, [*draft.reads(), draft.dst])
    ropes = [Rope(vector(f), int(f.size), factor) for f, factor in drafting.ropes]
    layers = []
    for i, cache in enumerate(drafting.decoder.layers):
        scale, softcap, sinks = drafting.layers[i]
        layers.append(
            Layer(
                cache.q_heads, cache.kv_heads, cache.head_dim, cache.value_dim, cache.sliding_window, scale, softcap,
                vector(sinks),
            )
        )  # fmt: skip
    narrow = drafting.precision.hint == "bf16"
    return Program(
        tuple(ops), tuple(matrices), tuple(ropes), tuple(layers), tuple(buffers.buffers), narrow, buffers.output,
        packing.align(file), drafting.sparsity.to_string(),
    )  # fmt: skip


def draft(graph: Graph, precision: Precision) -> Drafting:
    """The graph as a program in the making.

    Raises:
        NoForm: the library cannot run it.
    """
    return Drafting(graph, precision)
