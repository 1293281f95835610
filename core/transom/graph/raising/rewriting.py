"""Rewrites a verified decoder: standard inputs and outputs, with the tokens of all sequences packed into one row.

Every hidden value keeps its shape for a batch of one: [1, tokens, …]. Only the attention nodes distinguish sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from transom.graph.builder import DecoderInputs
from transom.graph.editing import Editor
from transom.graph.raising.abstract import Facts
from transom.graph.raising.lengths import Lengths
from transom.graph.raising.reasons import CannotRaise
from transom.graph.raising.sites import AttentionSite
from transom.graph.raising.verifying import AttentionSpec, Layout, Layouts
from transom.graph.weights import Array

_ELEMENTWISE = ("Cast", "Mul", "Div", "Add", "Sub", "Tanh", "Neg", "Identity", "Clip")


class Rewriter:
    """Rewrites one model in place."""

    def __init__(self, model: ir.Model, facts: Mapping[Lengths, Facts], old: Sequence[ir.Value]) -> None:
        self.editor = e = Editor(model)
        self.facts = facts
        for value in old:  # their names may clash with the standard inputs
            value.name = e._name(f"{value.name}.before")
        self._free_names()
        self.inputs = e.decoder_inputs()
        self.present: list[tuple[ir.Value, ir.Value]] = []
        self._distances: ir.Value | None = None

    def _free_names(self) -> None:
        """Rename values whose names the standard inputs and outputs need."""
        e = self.editor
        standard = {*DecoderInputs._fields, "logits"}

        def reserved(name: str) -> bool:
            return name in standard or name.startswith(("past_key.", "past_value.", "present_key.", "present_value."))

        graph = e.graph
        for value in [*graph.inputs, *graph.initializers.values(), *(v for n in graph for v in n.outputs)]:
            if reserved(str(value.name)):
                value.name = e._name(f"{value.name}.before")

    def ids(self, old: ir.Value) -> None:
        """Replace the token ids [1, tokens] by `input_ids` [tokens]."""
        new = self.editor.op("Unsqueeze", self.inputs.input_ids, self.editor.constant([0]), name="input_ids.batch")
        if old.dtype is not None and old.dtype != ir.DataType.INT64:
            new = self.editor.op("Cast", new, to=int(old.dtype), name="input_ids.cast")
        old.replace_all_uses_with(new)

    def position_values(self, graph_inputs: Sequence[ir.Value]) -> None:
        """Replace values that equal past + 0, 1, 2 … plus a constant, for all lengths, by the input `positions`."""
        pure: set[int] = set()
        for value in graph_inputs:
            self._position(value, pure)
        for node in list(self.editor.graph):
            inputs = [v for v in node.inputs if v is not None and v.const_value is None]
            if inputs and all(id(v) in pure for v in inputs):
                pure.update(id(v) for v in node.outputs)
                continue
            for value in node.outputs:
                self._position(value, pure)

    def _position(self, value: ir.Value, pure: set[int]) -> None:
        found = _as_positions(value, self.facts)
        if found is None or not value.uses():
            return
        offset, axis, shape = found
        e = self.editor
        new = self.inputs.positions
        if offset:
            new = e.op("Add", new, e.constant(offset), name="positions.shifted")
        axes = [a for a in range(len(shape)) if a != axis]
        if axes:
            new = e.op("Unsqueeze", new, e.constant(axes), name="positions.batch")
        if any(shape[a] != 1 for a in axes):
            new = e.op("Expand", new, e.constant([1 if a == axis else d for a, d in enumerate(shape)]))
        if value.dtype is not None and value.dtype != ir.DataType.INT64:
            new = e.op("Cast", new, to=int(value.dtype), name="positions.cast")
        value.replace_all_uses_with(new)
        pure.add(id(value))

    # attention -------------------------------------------------------------------------------------------------------
    def attention(self, site: AttentionSite, spec: AttentionSpec, layouts: Layouts) -> None:
        """Replace the site's nodes by `transom::CachedAttention`."""
        e, step, layer = self.editor, self.inputs, site.layer
        past = e.cache_inputs(layer, spec.cache)
        with e.scope(f"layers.{layer}.attention"):
            inputs: list[ir.Value | None] = [
                self._flat(site.query, layouts.query, "query"),
                self._flat(site.new_key, layouts.key, "key"),
                self._flat(site.new_value, layouts.value, "value"),
                *past,
                *(step.sequences, step.positions, step.past_sequences, step.past_positions),
            ]
            if spec.slopes or spec.sinks:
                inputs.append(self._bias(spec) if spec.slopes else None)
            if spec.sinks:
                inputs.append(e.constant(np.asarray(spec.sinks, np.float32), "sinks"))
            output, present_key, present_value = e.nodes(
                "CachedAttention", *inputs, domain="transom", outputs=3, name="cached", **spec.attributes, layer=layer
            )
            self.present.append((present_key, present_value))
            back = self._unflat(output, layouts.output)
        site.output.replace_all_uses_with(back)

    def _flat(self, value: ir.Value, layout: Layout, name: str) -> ir.Value:
        """The value reshaped to [tokens, width]."""
        e = self.editor
        if not layout.leads:
            order = [layout.axis, *(a for a in range(len(layout.shape)) if a != layout.axis)]
            value = e.op("Transpose", value, perm=order, name=f"{name}.rows")
        return e.op("Reshape", value, e.constant([-1, layout.width]), name=f"{name}.flat")

    def _unflat(self, value: ir.Value, layout: Layout) -> ir.Value:
        """The value [tokens, width] in the layout that the following nodes expect."""
        e = self.editor
        if layout.leads:
            return e.op("Reshape", value, e.constant(list(layout.shape)), name="output")
        rest = [d for i, d in enumerate(layout.shape) if i != layout.axis]
        order = list(range(1, len(rest) + 1))
        order.insert(layout.axis, 0)
        heads = e.op("Reshape", value, e.constant([-1, *rest]), name="output.heads")
        return e.op("Transpose", heads, perm=order, name="output")

    def _bias(self, spec: AttentionSpec) -> ir.Value:
        """The ALiBi bias, slope × (position of the key - position of the query): [heads, tokens, past + tokens]."""
        e = self.editor
        if self._distances is None:
            positions = self.inputs.positions
            every = e.op("Concat", self.inputs.past_positions, positions, axis=0, name="alibi.positions")
            keys, queries = e.op("Unsqueeze", every, e.constant([0])), e.op("Unsqueeze", positions, e.constant([1]))
            distance = e.op("Sub", keys, queries)
            self._distances = e.op("Cast", distance, to=int(ir.DataType.FLOAT), name="alibi.distance")
        slopes = e.constant(np.asarray(spec.slopes, np.float32).reshape(-1, 1, 1), "slopes")
        return e.op("Mul", slopes, self._distances, name="alibi.bias")

    # logits ----------------------------------------------------------------------------------------------------------
    def logits(self, old: ir.Value, layout: Layout, vocabulary: int) -> None:
        """Select the logit rows before the vocabulary matrix product instead of after it."""
        e = self.editor
        e.graph.outputs.clear()
        chain: list[ir.Node] = []
        at = old
        while (node := at.producer()) is not None and self._row_by_row(node, at):
            chain.append(node)
            at = self._data(node)
            if node.op_type in ("MatMul", "Gemm"):
                break
        if not chain or chain[-1].op_type != "MatMul":
            chain, at = [], old
        axis = layout.axis
        name = "logit_rows.hidden" if chain else "logit_rows.logits"
        new = e.op("Gather", at, self.inputs.logit_rows, axis=axis, name=name)
        new.type = ir.TensorType(ir.DataType.FLOAT)
        for node in reversed(chain):
            inputs = [new if v is self._data(node) else v for v in node.inputs]
            attributes = {name: a.value for name, a in node.attributes.items()}
            new = e.op(node.op_type, *inputs, name=f"{node.name}.rows", **attributes)
        new = e.op("Reshape", new, e.constant([-1, vocabulary]), name="logits")
        new.type = ir.TensorType(ir.DataType.FLOAT)
        e.output(new, "logits", ["rows", vocabulary])

    def _data(self, node: ir.Node) -> ir.Value:
        """The only input that depends on tokens."""
        return next(v for v in node.inputs if v is not None and not self._fixed(v))

    def _row_by_row(self, node: ir.Node, value: ir.Value) -> bool:
        """Whether each output row depends only on the same row of one input."""
        if node.domain or value is not node.outputs[0]:
            return False
        data = [v for v in node.inputs if v is not None and not self._fixed(v)]
        if len(data) != 1:
            return False
        if node.op_type == "MatMul":
            return node.inputs[0] is data[0]
        if node.op_type not in _ELEMENTWISE:
            return False
        shapes = [f[id(data[0])].shape if id(data[0]) in f else None for f in self.facts.values()]
        return shapes == [f[id(value)].shape if id(value) in f else None for f in self.facts.values()]

    def _fixed(self, value: ir.Value, depth: int = 8) -> bool:
        """Whether a value depends only on weights."""
        if value.const_value is not None:
            return True
        node = value.producer()
        if node is None or not depth or not node.inputs:
            return False
        return all(v is None or self._fixed(v, depth - 1) for v in node.inputs)

    def caches(self, specs: Sequence[AttentionSpec]) -> None:
        """Make the caches outputs, in layer order."""
        for layer, (spec, present) in enumerate(zip(specs, self.present, strict=True)):
            self.editor.cache_outputs(layer, spec.cache, present)

    def rotations(self) -> None:
        """Normalize every `RotaryEmbedding`: input [1, tokens, heads * columns], cos and sin one row per token."""
        rows: dict[tuple[int, int], ir.Value] = {}
        for node in [n for n in self.editor.graph if n.op_type == "RotaryEmbedding" and not n.domain]:
            self._rows_of_tables(node, rows)
            self._heads_last(node)

    def _rows_of_tables(self, node: ir.Node, rows: dict[tuple[int, int], ir.Value]) -> None:
        """Gather rows of cos and sin by position, instead of passing whole tables and positions."""
        positions = node.inputs[3] if len(node.inputs) > 3 else None
        if positions is None:
            return
        for index in (1, 2):
            table = node.inputs[index]
            assert table is not None
            key = (id(table), id(positions))
            if key not in rows:
                rows[key] = self.editor.op("Gather", table, positions, axis=0, name=f"{table.name}.rows")
                rows[key].type = table.type
            node.replace_input_with(index, rows[key])
        node.replace_input_with(3, None)
        node.resize_inputs(3)

    def _heads_last(self, node: ir.Node) -> None:
        """Rotate before the Transpose that produces [1, heads, tokens, columns], not after it."""
        e, rotated, x = self.editor, node.outputs[0], node.inputs[0]
        before = None if x is None else x.producer()
        if before is None or before.op_type != "Transpose" or before.attributes.get_ints("perm") != (0, 2, 1, 3):
            return
        known = next(iter(self.facts.values())).get(id(x))
        if known is None or known.shape is None or len(known.shape) != 4:
            return
        heads, columns = known.shape[1], known.shape[3]
        flat = e.op("Reshape", before.inputs[0], e.constant([1, -1, heads * columns]), name=f"{node.name}.flat")
        attributes = {name: a.value for name, a in node.attributes.items()} | {"num_heads": heads}
        new = e.op("RotaryEmbedding", flat, *node.inputs[1:], name=f"{node.name}.turned", **attributes)
        split = e.op("Reshape", new, e.constant([1, -1, heads, columns]), name=f"{node.name}.heads")
        back = e.op("Transpose", split, perm=[0, 2, 1, 3], name=f"{node.name}.back")
        rotated.replace_all_uses_with(back)


def _as_positions(value: ir.Value, facts: Mapping[Lengths, Facts]) -> tuple[int, int, tuple[int, ...]] | None:
    """(constant, axis of the tokens, shape) if the value is past + 0, 1, 2 … plus a constant, for all lengths."""
    found: set[tuple[int, int, tuple[int, ...]]] = set()
    for lengths, known in facts.items():
        if lengths.new < 2:
            continue
        array = known[id(value)].array if id(value) in known else None
        if array is None or array.ndim == 0 or array.dtype.kind not in "if":
            return None
        axes = [a for a, d in enumerate(array.shape) if d == lengths.new]
        fits = [(a, offset) for a in axes if (offset := _offset(array, a, lengths)) is not None]
        if len(fits) != 1:
            return None
        axis, offset = fits[0]
        found.add((offset, axis, tuple(1 if a == axis else d for a, d in enumerate(array.shape))))
    if len(found) != 1:
        return None
    (only,) = found
    return only


def _offset(array: Array, axis: int, lengths: Lengths) -> int | None:
    rows = np.moveaxis(array, axis, -1).reshape(-1, lengths.new).astype(np.float64)
    difference = rows - np.arange(lengths.past, lengths.total)
    first = difference.reshape(-1)[0]
    return int(first) if np.isfinite(first) and first == int(first) and (difference == first).all() else None


def require_positions_only(model: ir.Model, facts: Mapping[Lengths, Facts]) -> None:
    """Refuse values that depend on a token's index in the step other than through its position.

    Raises:
        CannotRaise: there is such a value; the message names it.
    """
    for node in model.graph:
        for value in node.outputs:
            if _varies_by_token(value, facts) and _depends_on_lengths_only(value):
                raise CannotRaise(f"the value {value.name} depends on a token's index in the batch")


def _varies_by_token(value: ir.Value, facts: Mapping[Lengths, Facts]) -> bool:
    """Whether one axis has one entry per new token, and the entries differ."""
    arrays = {lengths: f[id(value)].array for lengths, f in facts.items() if id(value) in f and lengths.new > 1}
    known = {lengths: a for lengths, a in arrays.items() if a is not None}
    if not known or len({a.ndim for a in known.values()}) != 1:
        return False
    for axis in range(next(iter(known.values())).ndim):
        if all(a.shape[axis] == lengths.new for lengths, a in known.items()):
            return not all(bool((a == np.take(a, [0], axis)).all()) for a in known.values())
    return False


def _depends_on_lengths_only(value: ir.Value, depth: int = 64) -> bool:
    """Whether the value depends on graph inputs only through their shapes."""
    node = value.producer()
    if node is None:
        return not value.is_graph_input()
    if node.op_type in ("Shape", "Size"):
        return True
    return depth > 0 and all(v is None or _depends_on_lengths_only(v, depth - 1) for v in node.inputs)
