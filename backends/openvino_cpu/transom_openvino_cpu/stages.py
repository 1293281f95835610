"""Splits a decoder into stages that run in order, each with its own precision.

The vocabulary matrix is a stage of its own, so that the logits of a long text can be computed some rows at a time.
Computed at once they would take hundreds of megabytes that the engine never frees.

bfloat16 between operators suits a decoder's layers but not its two ends: a position times a frequency needs more than 8
bits (at position 300 the angle would be off by a radian), and logits near 30 would be rounded to eighths. With a narrow
hint the vocabulary matrix and the rotary tables are therefore computed in float32. The engine does so for the tables if
it fuses every rotation; otherwise they get a stage of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from transom.graph.reading import linear_weight
from transom.graph.weights import Blocked

if TYPE_CHECKING:
    import onnx_ir as ir

    from transom.graph import Graph
    from transom_openvino_cpu.precision import CpuPrecision, Hint

Name = Literal["tables", "body", "head"]


@dataclass(frozen=True)
class Cut:
    """One stage: some nodes of the graph, in order."""

    name: Name
    hint: Hint
    nodes: Sequence[ir.Node]


def cut(graph: Graph, precision: CpuPrecision, *, tables_apart: bool) -> list[Cut]:
    """The stages of a graph; a graph that is not a decoder has one.

    Args:
        tables_apart: with a narrow hint, put the rotary tables into a stage of their own.
    """
    nodes = list(graph.nodes())
    if graph.decoder is None:
        return [Cut("body", precision.hint, nodes)]
    tables = _tables(graph, nodes) if precision.hint != "f32" and tables_apart else set()
    head = _head(graph, nodes)
    body = [n for n in nodes if id(n) not in tables and id(n) not in head]
    in_front = [n for n in nodes if id(n) in tables]
    behind = [n for n in nodes if id(n) in head]
    # A float32 hint would unpack plain matrices to float32. A narrow hint gives float32 results too, since nothing is
    # rounded behind the product.
    matrices = [w for n in behind if (w := linear_weight(n)) is not None]
    wide = all(isinstance(w, Blocked) for w in matrices)
    stages = [Cut("tables", "f32", in_front), Cut("body", precision.hint, body)]
    stages.append(Cut("head", "f32" if wide else precision.hint, behind))
    return [s for s in stages if s.nodes]


def has_wide_tables(compiled: Any) -> bool:
    """Whether a compiled body computes its rotary tables entirely in float32: no narrow value is on the way to a sine
    or cosine, or from one to its rotation."""

    def info(node: Any, key: str) -> str:
        return str(node.get_rt_info()[key].astype(str))

    nodes = compiled.get_runtime_model().get_ordered_ops()
    waves = [n for n in nodes if info(n, "layerType") == "Math"]
    before = [i.get_source_output().get_node() for n in waves for i in n.inputs()]
    after = [i.get_node() for n in waves for o in n.outputs() for i in o.get_target_inputs()]
    while before or after:
        node, forwards = (before.pop(), False) if before else (after.pop(), True)
        if forwards and info(node, "layerType") == "RoPE":
            continue
        if set(info(node, "outputPrecisions").split(",")) & {"bf16", "f16"}:
            return False
        if forwards:
            after += [i.get_node() for o in node.outputs() for i in o.get_target_inputs()]
        else:
            before += [i.get_source_output().get_node() for i in node.inputs()]
    return bool(waves)


def _inputs(graph: Graph, *names: str) -> set[int]:
    return {id(v) for v in graph.model.graph.inputs if v.name in names}


def _tables(graph: Graph, nodes: Iterable[ir.Node]) -> set[int]:
    """Sines and cosines of positions, their inputs, and the nodes that depend only on them."""
    positions = _inputs(graph, "positions")
    from_positions: dict[int, ir.Node] = {}
    values = set(positions)
    for node in nodes:
        computed = [v for v in node.inputs if v is not None and not _fixed(v)]
        if computed and all(id(v) in values for v in computed):
            from_positions[id(node)] = node
            values |= {id(v) for v in node.outputs}
    chosen: set[int] = set()
    waves: set[int] = set()
    for node in from_positions.values():
        sources = [v.producer() for v in node.inputs if v is not None]
        if node.op_type in ("Sin", "Cos") or any(id(p) in waves for p in sources if p is not None):
            waves.add(id(node))
            chosen.add(id(node))
            stack = [p for p in sources if p is not None]
            while stack:
                parent = stack.pop()
                if id(parent) in from_positions and id(parent) not in chosen:
                    chosen.add(id(parent))
                    stack += [p for v in parent.inputs if v is not None and (p := v.producer()) is not None]
    return chosen


def _head(graph: Graph, nodes: Iterable[ir.Node]) -> set[int]:
    """The nodes behind the selection of the rows that need logits."""
    rows = _inputs(graph, "logit_rows")
    after: set[int] = set()
    chosen: set[int] = set()
    for node in nodes:
        read = [v for v in node.inputs if v is not None]
        if node.op_type == "Gather" and any(id(v) in rows for v in read):
            after |= {id(v) for v in node.outputs}
        elif any(id(v) in after for v in read):
            chosen.add(id(node))
            after |= {id(v) for v in node.outputs}
        elif any(id(v) in rows for v in read):
            return set()  # rows are selected in an unsupported way
    return chosen


def _fixed(value: ir.Value) -> bool:
    """Whether the value is an initializer or computed from initializers alone."""
    if value.const_value is not None:
        return True
    node = value.producer()
    if node is None:
        return False
    return node.op_type == "Constant" or (bool(node.inputs) and all(v is None or _fixed(v) for v in node.inputs))
