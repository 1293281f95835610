"""Lowers a neutral graph to OpenVINO models, one per stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from transom.graph.reading import attributes_of, linear_weight, vocabulary_products
from transom.graph.sparse import is_attention
from transom.graph.weights import Blocked, Weight, concat_rows
from transom_openvino_cpu.attention import Heads, PageInputs, paged_attention
from transom_openvino_cpu.paged_attention import paged
from transom_openvino_cpu.precision import CpuPrecision, ProductForm, form_of
from transom_openvino_cpu.stages import Cut, cut

if TYPE_CHECKING:
    import onnx_ir as ir

    from transom.graph import Graph

Node = Any
Progress = Callable[[float], None]
SPECIAL_TYPES = {
    "BFLOAT16": "bf16", "FLOAT8E4M3FN": "f8e4m3", "FLOAT8E5M2": "f8e5m2", "FLOAT8E8M0": "f8e8m0",
    "FLOAT4E2M1": "f4e2m1", "INT4": "i4", "UINT4": "u4", "STRING": "string",
}  # fmt: skip
"""ONNX's element types that NumPy lacks, in OpenVINO's names."""
FUSE_ROWS = 3
"""Products of one input are fused if their rows are at most this many times their columns: query, key and value. The
wide pair of a gated MLP is not, since prefill would spend more time on splitting its output."""
FUSE_ELEMENTS = 2 << 20
"""Smaller products are always fused: starting one takes longer than a decode step spends in it."""


@dataclass
class Stage:
    """One lowered stage."""

    name: str
    hint: str
    model: Any
    """`openvino.Model`; its results are in the order of `outputs`."""
    outputs: list[str]
    forms: list[tuple[Weight, ProductForm]] = field(default_factory=list)
    """The matrices of its products and how each is stored."""
    rotates: bool = False
    """Whether it computes sines and cosines of positions."""


def lower(graph: Graph, precision: CpuPrecision, progress: Progress, *, tables_apart: bool) -> list[Stage]:
    """The graph's stages, in execution order."""
    cuts = cut(graph, precision, tables_apart=tables_apart)
    in_pages = paged(graph)
    wanted = [v for v in graph.model.graph.outputs if not (in_pages and str(v.name).startswith("present_"))]
    known: dict[int, Boundary] = {}
    stages = []
    count = sum(len(c.nodes) for c in cuts)
    done = 0
    for index, part in enumerate(cuts):
        later = {id(v) for c in cuts[index + 1 :] for n in c.nodes for v in n.inputs if v is not None}
        writer = StageWriter(graph, part, precision, known, in_pages)
        for node in part.nodes:
            writer.lower(node)
            done += 1
            progress(done / count)
        made = {id(v): v for n in part.nodes for v in n.outputs}
        outputs = [v for i, v in made.items() if i in later and not writer.is_constant(v)]
        outputs += [v for v in wanted if id(v) not in known and (id(v) in made or index == len(cuts) - 1)]
        outputs = list({id(v): v for v in outputs}.values())
        stages.append(writer.finish(outputs))
        for value in outputs:
            node = writer.get(value)
            known[id(value)] = Boundary(str(value.name), node.get_element_type(), node.get_partial_shape())
    return stages


@dataclass(frozen=True)
class Boundary:
    """A value that one stage computes and another reads."""

    name: str
    element_type: Any
    shape: Any


class StageWriter:
    """Writes one stage: nodes in order, weights and constants when a node needs them."""

    def __init__(
        self, graph: Graph, part: Cut, precision: CpuPrecision, known: Mapping[int, Boundary], in_pages: bool
    ) -> None:
        self.graph, self.part, self.precision = graph, part, precision
        self.forms: list[tuple[Weight, ProductForm]] = []
        self._known = known
        self._values: dict[int, Node] = {}
        self._parameters: list[Node] = []
        self._pages = PageInputs() if in_pages and part.name == "body" else None
        self._inside = {id(n) for n in part.nodes}
        self._constant_nodes = self._find_constant_nodes()
        self._done: set[int] = set()
        self._matrices: dict[int, Node] = {}
        self._heads = vocabulary_products(graph)
        self._groups = self._same_input()

    # values -----------------------------------------------------------------------------------------------------------
    def get(self, value: ir.Value | None) -> Node:
        """The lowered value, as `openvino.Output`."""
        from transom_openvino_cpu.operators import initializer

        if value is None:
            raise ValueError("a required input of the operator is absent")
        found = self._values.get(id(value))
        if found is not None:
            return found
        node = value.producer()
        if value.const_value is not None:
            return self._set(value, initializer(value))
        if node is not None and id(node) in self._constant_nodes:
            self._lower(node)
            return self._values[id(value)]
        return self._set(value, self._parameter(value))

    def is_constant(self, value: ir.Value) -> bool:
        node = value.producer()
        return value.const_value is not None or (node is not None and id(node) in self._constant_nodes)

    def _set(self, value: ir.Value, node: Node) -> Node:
        import openvino as ov

        output = node if isinstance(node, ov.Output) else node.output(0)
        self._values[id(value)] = output
        return output

    def _parameter(self, value: ir.Value) -> Node:
        import openvino as ov
        from openvino import opset13 as op

        known = self._known.get(id(value))
        if known is not None:
            parameter = op.parameter(known.shape, known.element_type, name=known.name)
        else:
            if value.dtype is None or value.shape is None:
                raise ValueError(f"the input {value.name} has no element type or shape")
            shape = ov.PartialShape([d if isinstance(d, int) else -1 for d in value.shape])
            parameter = op.parameter(shape, element_type_of(value), name=str(value.name))
        self._parameters.append(parameter)
        return parameter

    def _find_constant_nodes(self) -> set[int]:
        """Nodes that depend on weights alone: lowered only on demand, since most are folded into their readers."""
        found: set[int] = set()
        for node in self.graph.nodes():
            inputs = [v for v in node.inputs if v is not None]
            if node.op_type in ("If", "Loop", "Scan") or (not inputs and node.op_type != "Constant"):
                continue
            producers = [(v, v.producer()) for v in inputs]
            if all(v.const_value is not None or (p is not None and id(p) in found) for v, p in producers):
                found.add(id(node))
        return found

    # nodes ------------------------------------------------------------------------------------------------------------
    def lower(self, node: ir.Node) -> None:
        """Lower a node of the stage, unless it was lowered with another node or is a constant, lowered on demand."""
        if id(node) not in self._constant_nodes and id(node) not in self._done:
            self._lower(node)

    def _lower(self, node: ir.Node) -> None:
        from transom_openvino_cpu.operators import TABLE

        if is_attention(node):
            self._set(node.outputs[0], self._attention(node))
            return
        function = TABLE.get(node.op_type)
        try:
            results = self.through_frontend(node) if function is None else function(self, node, attributes_of(node))
        except RuntimeError:  # OpenVINO's own operator takes less than ONNX's
            if function is None:
                raise
            results = self.through_frontend(node)
        for value, result in zip(node.outputs, results, strict=False):
            self._set(value, result)

    def lowered(self, node: ir.Node) -> list[Node]:
        """The outputs of a node that was lowered, or is a constant that is lowered now; one entry for each output
        that is used."""
        return [self.get(v) for v in node.outputs if v.uses() or v.is_graph_output()]

    def assume(self, node: ir.Node) -> None:
        """Use parameters of the declared types and shapes as the outputs of a node that cannot be lowered."""
        import openvino as ov
        from openvino import opset13 as op

        for value in node.outputs:
            try:
                kind = ov.Type.f32 if value.dtype is None else element_type_of(value)
            except (RuntimeError, TypeError):
                kind = ov.Type.f32
            if value.shape is None:
                shape = ov.PartialShape.dynamic()
            else:
                shape = ov.PartialShape([d if isinstance(d, int) else -1 for d in value.shape])
            self._set(value, op.parameter(shape, kind))

    def skip(self, node: ir.Node, result: Node) -> None:
        """Use `result` as the only output of a node, which is then not lowered."""
        self._set(node.outputs[0], result)
        self._done.add(id(node))

    def through_frontend(self, node: ir.Node) -> list[Node]:
        from transom_openvino_cpu import frontend

        return frontend.convert(node, [None if v is None else self.get(v) for v in node.inputs])

    def _attention(self, node: ir.Node) -> Node:
        decoder = self.graph.decoder
        if self._pages is None or decoder is None:
            raise ValueError(f"{node.name} was claimed for a graph whose cache is not paged")
        attributes = attributes_of(node)
        layer = int(attributes["layer"])
        cache = decoder.layers[layer]
        heads = Heads(cache.q_heads, cache.kv_heads, cache.head_dim, cache.value_dim)
        sinks = self.get(node.inputs[10]) if len(node.inputs) > 10 and node.inputs[10] is not None else None
        return paged_attention(
            [self.get(v) for v in node.inputs[:3]],
            self._pages,
            layer,
            heads,
            scale=float(attributes["scale"]) or cache.head_dim**-0.5,
            window=int(attributes["sliding_window"]),
            sinks=sinks,
        )

    # matrix products --------------------------------------------------------------------------------------------------
    def _same_input(self) -> dict[int, list[ir.Node]]:
        """For each product to be fused: all products of its group, in order."""
        by_input: dict[int, list[ir.Node]] = {}
        for node in self.part.nodes:
            if linear_weight(node) is not None:
                by_input.setdefault(id(node.inputs[0]), []).append(node)
        groups: dict[int, list[ir.Node]] = {}
        for nodes in by_input.values():
            weights = [w for n in nodes if (w := linear_weight(n)) is not None]
            rows, columns = sum(w.shape[0] for w in weights), weights[0].shape[1]
            if len(nodes) < 2 or (rows > FUSE_ROWS * columns and rows * columns > FUSE_ELEMENTS):
                continue
            if len({id(n.inputs[1]) for n in nodes}) == len(nodes) and concat_rows(weights) is not None:
                groups |= {id(n): nodes for n in nodes}
        return groups

    def linear(self, node: ir.Node) -> Node | None:
        """A product with a weight matrix; None for any other product."""
        from openvino import opset13 as op

        weight = linear_weight(node)
        if weight is None:
            return None
        group = self._groups.get(id(node))
        if group is None:
            return self._product(node, weight, id(node.inputs[1]))
        weights = [w for n in group if (w := linear_weight(n)) is not None]
        joined = concat_rows(weights)
        assert joined is not None
        product = self._product(group[0], joined, None)
        sizes = op.constant(np.array([w.shape[0] for w in weights], np.int64))
        parts = op.variadic_split(product, op.constant(np.int64(-1)), sizes).outputs()
        for member, part in zip(group, parts, strict=True):
            self._set(member.outputs[0], part)
            self._done.add(id(member))
        return parts[group.index(node)]

    def _product(self, node: ir.Node, weight: Weight, key: int | None) -> Node:
        """`key` identifies a matrix that several products may share."""
        from openvino import opset13 as op

        from transom_openvino_cpu.weights import matrix

        found = None if key is None else self._matrices.get(key)
        if found is None:
            dynamic = self.precision.dynamic and self.part.name != "head" and str(node.name) not in self._heads
            block = weight.block if isinstance(weight, Blocked) else 0
            form = form_of(weight, self.precision) if dynamic else ProductForm("stored", block)
            if dynamic:
                self.forms.append((weight, form))
            exact = self.part.hint == "f32" and form.kind == "stored"
            found = matrix(weight, form, exact=exact)
            if key is not None:
                self._matrices[key] = found
        return op.matmul(self.get(node.inputs[0]), found, False, True)

    def _anchored(self, output: Node) -> Node:
        """The output of a narrow body, multiplied by the identity matrix, which changes no bit.

        The plug-in computes everything behind the last matrix product in float32. Without this product that would be
        the whole residual stream: two conversions around each addition, 5 % of a decode step, no more accurate logits.
        """
        from openvino import opset13 as op

        shape = output.get_partial_shape()
        if self.part.name != "body" or self.part.hint == "f32" or self.graph.decoder is None:
            return output
        if shape.rank.get_length() != 2 or not output.get_element_type().is_real() or shape[1].is_dynamic:
            return output
        width = shape[1].get_length()
        block = next((b for b in (64, 32, 16) if width % b == 0), 0)
        if not block:
            return output
        rows = op.reshape(output, op.constant(np.array([-1, block], np.int64)), False)
        same = op.matmul(rows, op.constant(np.eye(block, dtype=np.float32)), False, True)
        return op.reshape(same, op.constant(np.array([-1, width], np.int64)), False).output(0)

    # the end ----------------------------------------------------------------------------------------------------------
    def finish(self, outputs: Sequence[ir.Value]) -> Stage:
        import openvino as ov
        from openvino import opset13 as op

        results = [op.result(self._anchored(self.get(value))) for value in outputs]
        parameters = [*self._parameters, *(self._pages.parameters() if self._pages else ())]
        model = ov.Model(results, parameters, f"{self.graph.name}.{self.part.name}")
        rotates = any(n.op_type in ("Sin", "Cos") for n in self.part.nodes)
        return Stage(self.part.name, self.part.hint, model, [str(v.name) for v in outputs], self.forms, rotates)


def element_type_of(value: ir.Value) -> Any:
    import openvino as ov

    assert value.dtype is not None
    name = SPECIAL_TYPES.get(value.dtype.name)
    if name is not None:
        return getattr(ov.Type, name)
    return ov.Type(value.dtype.numpy())
