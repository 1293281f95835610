"""Simplifies a raised graph: results of arithmetic on lengths become constants, and redundant nodes are removed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass

from transom.graph.editing import Editor, all_nodes
from transom.graph.raising.abstract import Facts
from transom.graph.raising.lengths import Lengths
from transom.graph.weights import Array

_MAX_FOLDED_BYTES = 1 << 12
"""Larger values are not folded: they are weights in another form, which keep their stored form."""
_MAYBE_COPIES = ("Expand", "Slice", "Reshape", "Identity", "Dropout")
_Shape = tuple[int, ...]


def inline_known_branches(model: ir.Model, facts: Mapping[Lengths, Facts]) -> bool:
    """Replace each `If` whose condition is the same for all lengths by its branch. Returns whether there was one."""
    found = False
    for node in [n for n in model.graph if n.op_type == "If" and not n.domain]:
        condition = node.inputs[0]
        arrays = [None if condition is None else f[id(condition)].array for f in facts.values()]
        values = {None if a is None else bool(np.all(a)) for a in arrays}
        if len(values) != 1 or None in values:
            continue
        (taken,) = values
        _inline(model, node, node.attributes["then_branch" if taken else "else_branch"].as_graph())
        found = True
    return found


def _inline(model: ir.Model, node: ir.Node, branch: ir.Graph) -> None:
    editor = Editor(model)
    outputs, inner = list(branch.outputs), list(branch)
    for value in list(branch.initializers.values()):
        tensor = value.const_value
        assert tensor is not None
        moved = ir.Value(name=editor._name(str(value.name)), type=value.type, shape=value.shape, const_value=tensor)
        model.graph.register_initializer(moved)
        value.replace_all_uses_with(moved)
        outputs = [moved if o is value else o for o in outputs]
    for value in list(branch.outputs):
        branch.outputs.remove(value)
    branch.remove(inner)
    model.graph.insert_before(node, inner)
    for old, new in zip(list(node.outputs), outputs, strict=True):
        editor.replace(old, new)
    model.graph.remove(node, safe=True)
    editor.finish_edit()


def fold(editor: Editor, facts: Mapping[Lengths, Facts]) -> None:
    """Replace values that are the same for all lengths by constants, and copies by their sources."""
    model = editor.model
    for node in list(model.graph):
        if node.op_type in ("If", "Loop", "Scan"):
            continue
        for value in node.outputs:
            if not value.uses() or value.is_graph_output():
                continue
            constant = _constant(value, facts)
            if constant is not None:
                value.replace_all_uses_with(editor.constant(constant, str(value.name)))
    for node in list(model.graph):
        _plain_shape(editor, node, facts)
    editor.finish_edit()


def _constant(value: ir.Value, facts: Mapping[Lengths, Facts]) -> Array | None:
    arrays = [f[id(value)].array if id(value) in f else None for f in facts.values()]
    first = arrays[0]
    if first is None or first.nbytes > _MAX_FOLDED_BYTES or first.dtype.kind not in "fiub":
        return None
    for other in arrays[1:]:
        if other is None or other.shape != first.shape or not np.array_equal(other, first, equal_nan=True):
            return None
    return first


def _shapes(value: ir.Value | None, facts: Mapping[Lengths, Facts]) -> list[_Shape] | None:
    shapes = [f[id(value)].shape if value is not None and id(value) in f else None for f in facts.values()]
    return None if any(s is None for s in shapes) else [s for s in shapes if s is not None]


def _plain_shape(editor: Editor, node: ir.Node, facts: Mapping[Lengths, Facts]) -> None:
    if node.domain or node.op_type not in _MAYBE_COPIES or node.outputs[0].is_graph_output():
        return
    before, after = _shapes(node.inputs[0], facts), _shapes(node.outputs[0], facts)
    if after is None or node.inputs[0] is None:
        return
    rank = len(after[0])
    if before == after and not (node.op_type == "Slice" and _may_reverse(node, facts)):
        node.outputs[0].replace_all_uses_with(node.inputs[0])
    elif node.op_type == "Reshape":
        varying = [a for a in range(rank) if len({s[a] for s in after}) > 1]
        if len({len(s) for s in after}) == 1 and len(varying) <= 1:
            dims = [-1 if a in varying else d for a, d in enumerate(after[0])]
            node.attributes.pop("allowzero", None)
            node.replace_input_with(1, editor.constant(dims))
    elif node.op_type == "Expand" and before and all(len(b) == len(a) for b, a in zip(before, after, strict=True)):
        kept = [a for a in range(rank) if all(b[a] == s[a] for b, s in zip(before, after, strict=True))]
        if all(a in kept or len({s[a] for s in after}) == 1 for a in range(rank)):
            node.replace_input_with(1, editor.constant([1 if a in kept else after[0][a] for a in range(rank)]))


def _may_reverse(node: ir.Node, facts: Mapping[Lengths, Facts]) -> bool:
    """Whether a Slice may have a negative step."""
    steps = node.inputs[4] if len(node.inputs) > 4 else None
    if steps is None:
        return False
    arrays = (
        [steps.const_value.numpy()] if steps.const_value is not None else [f[id(steps)].array for f in facts.values()]
    )
    return any(a is None or (a < 0).any() for a in arrays)


def simplify(editor: Editor) -> None:
    """Merge adjacent reshapes, cancel transposes, remove casts without effect and common subexpressions."""
    model = editor.model
    CommonSubexpressionEliminationPass()(model)
    changed = True
    while changed:
        changed = False
        for node in list(model.graph):
            if node.graph is not None and not node.outputs[0].is_graph_output() and _simplify_one(editor, node):
                changed = True
        editor.finish_edit()


def _simplify_one(editor: Editor, node: ir.Node) -> bool:
    if node.domain or not node.inputs or node.inputs[0] is None:
        return False
    out, source = node.outputs[0], node.inputs[0]
    if not out.uses():
        return False
    before = source.producer()
    if node.op_type == "Cast" and source.dtype is not None and int(source.dtype) == node.attributes.get_int("to", 0):
        out.replace_all_uses_with(source)
        return True
    if node.op_type in ("Mul", "Div") and _is_one(node.inputs[1]):
        out.replace_all_uses_with(source)
        return True
    if node.op_type == "Reshape" and _reshapes_to_itself(source, node.inputs[1]):
        out.replace_all_uses_with(source)
        return True
    if before is None or before.domain:
        return False
    inner = before.inputs[0] if before.inputs else None
    if inner is None:
        return False
    if node.op_type == "Transpose" and before.op_type == "Transpose":
        first, second = before.attributes.get_ints("perm"), node.attributes.get_ints("perm")
        if first is None or second is None:
            return False
        perm = [first[i] for i in second]
        same = perm == list(range(len(perm)))
        out.replace_all_uses_with(
            inner if same else editor.op("Transpose", inner, perm=perm, name=f"{node.name}.joined")
        )
        return True
    if node.op_type == "Reshape" and before.op_type in ("Reshape", "Unsqueeze", "Squeeze"):
        shape = node.inputs[1]
        numbers = None if shape is None or shape.const_value is None else shape.const_value.numpy().tolist()
        if numbers is None or 0 in numbers or numbers.count(-1) > 1:
            return False
        node.replace_input_with(0, inner)
        return True
    if node.op_type == "Reshape" and before.op_type == "Transpose" and _keeps_order(before, inner):
        shape = node.inputs[1]
        if shape is None or shape.const_value is None or 0 in shape.const_value.numpy():
            return False
        node.replace_input_with(0, inner)
        return True
    return False


def _reshapes_to_itself(source: ir.Value, shape: ir.Value | None) -> bool:
    if shape is None or shape.const_value is None or source.shape is None:
        return False
    numbers = shape.const_value.numpy().tolist()
    open_axes = sum(not isinstance(d, int) for d in source.shape)
    return (
        len(numbers) == len(source.shape)
        and open_axes <= 1
        and all(n == d or (n == -1 and not isinstance(d, int)) for n, d in zip(numbers, source.shape, strict=True))
    )


def _keeps_order(transpose: ir.Node, source: ir.Value) -> bool:
    """Whether a Transpose moves only axes of size 1, so that a Reshape after it sees the same element order."""
    perm = transpose.attributes.get_ints("perm")
    if source.shape is None or perm is None or len(perm) != len(source.shape):
        return False
    kept = [axis for axis in perm if source.shape[axis] != 1]
    return kept == sorted(kept)


def _is_one(value: ir.Value | None) -> bool:
    tensor = None if value is None else value.const_value
    return tensor is not None and tensor.size == 1 and len(tensor.shape) == 0 and float(tensor.numpy()) == 1.0


def leftovers(model: ir.Model) -> dict[str, ir.Node]:
    """The graph inputs that are still read, each with one of its readers."""
    found: dict[str, ir.Node] = {}
    for node in all_nodes(model.graph):
        for value in node.inputs:
            if value is not None and value.is_graph_input() and value.graph is model.graph:
                found.setdefault(str(value.name), node)
    return found
