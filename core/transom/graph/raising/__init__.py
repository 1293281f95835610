"""Raising: a decoder that someone else exported becomes the neutral decoder with `transom::CachedAttention`.

The forms differ without end (standard `Attention` with or without past, `com.microsoft::GroupQueryAttention`, attention
written out as MatMul and Softmax by torch or Optimum), and a reader that matches patterns misreads the next one. So the
pass computes instead: it runs the graph without its weights for a few lengths to learn what masks, positions and
shapes are, finds each layer's attention between its cache and its output, runs those nodes on random numbers, and
replaces them only when the operator gives the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from transom.graph.graph import Graph
from transom.graph.raising.abstract import Facts, Interpreter
from transom.graph.raising.lengths import CacheInput, Lengths, facts_of_inputs, find_caches, find_ids
from transom.graph.raising.proving import Layout, Prover, layout_of
from transom.graph.raising.reasons import CannotRaise
from transom.graph.raising.rewriting import Rewriter, require_unmixed
from transom.graph.raising.sites import find_sites
from transom.graph.raising.tidying import fold, inline_known_branches, leftovers, simplify
from transom.graph.raising.widening import widen
from transom.graph.shapes import infer_shapes
from transom.signature import METADATA_KEY, Decoder, LayerCache

__all__ = ["CannotRaise", "Sizes", "looks_like_decoder", "raise_decoder"]

CHOICES = (Lengths(3, 5), Lengths(7, 0), Lengths(1, 1), Lengths(2, 11))
FAR = 1 << 16
"""A past longer than most sliding windows, where the context is not known."""
ASSUMED_CONTEXT = 4096
FARTHEST = 1 << 18


@dataclass(frozen=True)
class Sizes:
    """What the files beside a model say of it; 0 and empty where they do not."""

    family: str = "onnx"
    context: int = 0


def looks_like_decoder(graph: Graph) -> bool:
    """Whether the graph has caches: inputs that are appended to and given out again."""
    return bool(find_caches(graph.model.graph))


def raise_decoder(graph: Graph, sizes: Sizes | None = None) -> Graph:
    """The same model with the neutral inputs and outputs, or CannotRaise.

    Args:
        graph: a neutral graph with inputs and outputs of its own; left as it is.
        sizes: the model's family and context, where known.

    Raises:
        CannotRaise: the graph is no decoder with a cache, or its form is not recognised; says what is in the way.
    """
    sizes = sizes or Sizes()
    model = graph.model.clone()
    notes = list(graph.notes)
    if widen(model):
        notes.append("activations are computed in float32; 16-bit weights stay as they are")
    ids = find_ids(model.graph)
    _choose_branches(model, ids)
    caches = find_caches(model.graph)
    far = Lengths(2, min(max(sizes.context, 64), FARTHEST) + 3 if sizes.context else FAR)
    facts = _facts(model, ids, caches, far)
    if not caches:
        raise CannotRaise("it has no cache of keys and values that a step could append to")
    sites = find_sites(model.graph, caches, facts[CHOICES[0]])
    proven = [(site, prover, prover.form()) for site in sites for prover in [Prover(site, facts, (far, facts[far]))]]
    near = {k: v for k, v in facts.items() if k != far}
    logits = _logits(model.graph, caches)
    layout = _logits_layout(logits, near)
    vocabulary = next(d for d in reversed(layout.shape) if d > 0)

    old = list(model.graph.inputs)
    dropped = [str(v.name) for v in model.graph.outputs if v is not logits and v not in [c.present for c in caches]]
    rewriter = Rewriter(model, near, old)
    rewriter.position_values([v for v in old if v is not ids])
    rewriter.ids(ids)
    for site, prover, form in proven:
        rewriter.attention(site, form, prover.layouts)
    rewriter.logits(logits, layout, vocabulary)
    rewriter.caches([form for _, _, form in proven])
    rewriter.editor.finish_edit()
    fold(rewriter.editor, near)
    rewriter.rotations()
    rewriter.editor.finish_edit()
    infer_shapes(Graph(model, weights_hash=""))
    simplify(rewriter.editor)
    reading = leftovers(model)
    for value in old:
        if str(value.name) in reading:
            node = reading[str(value.name)]
            name = str(value.name).removesuffix(".before")
            raise CannotRaise(f"the node {node.name} ({node.op_type}) still depends on the input {name}")
        model.graph.inputs.remove(value)
    require_unmixed(model, near)
    if dropped:
        notes.append(f"outputs left out: {', '.join(dropped)}")
    return _finish(graph, model, [f for _, _, f in proven], sizes, vocabulary, notes)


def _choose_branches(model: ir.Model, ids: ir.Value) -> None:
    """Take the branch with a cache of a graph that has both (Optimum's merged decoders), and other known branches."""
    while any(n.op_type == "If" and not n.domain for n in model.graph):
        caches = find_caches(model.graph)
        interpreter = Interpreter(model)
        facts = {
            choice: interpreter.run(facts_of_inputs(model.graph, ids, caches, choice, strict=False))
            for choice in CHOICES
        }
        if not inline_known_branches(model, facts):
            return


def _facts(model: ir.Model, ids: ir.Value, caches: list[CacheInput], far: Lengths) -> dict[Lengths, Facts]:
    interpreter = Interpreter(model)
    return {lengths: interpreter.run(facts_of_inputs(model.graph, ids, caches, lengths)) for lengths in (*CHOICES, far)}


def _logits(graph: ir.Graph, caches: list[CacheInput]) -> ir.Value:
    present = [c.present for c in caches]
    rest = [v for v in graph.outputs if v not in present]
    named = [v for v in rest if str(v.name).endswith("logits")]
    if len(named) == 1 or len(rest) == 1:
        return (named or rest)[0]
    raise CannotRaise("none of its outputs is called logits")


def _logits_layout(logits: ir.Value, facts: dict[Lengths, Facts]) -> Layout:
    shapes = [f[id(logits)].shape for f in facts.values()]
    if len(set(shapes)) == 1 and shapes[0] is not None:
        raise CannotRaise("it gives the logits of the last token alone: export it with the logits of all tokens")
    layout = layout_of(logits, facts)
    if len([d for d in layout.shape if d > 1]) != 1 or layout.shape[-1] == -1:
        raise CannotRaise(f"its logits have the shape {list(layout.shape)}")
    return layout


def _finish(
    graph: Graph, model: ir.Model, forms: list[object], sizes: Sizes, vocabulary: int, notes: list[str]
) -> Graph:
    from transom.graph.raising.proving import Form

    layers = tuple(
        LayerCache(f.q_heads, f.kv_heads, f.head_dim, f.value_dim, f.window) for f in forms if isinstance(f, Form)
    )
    weights = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    context = sizes.context
    if not context:
        rows = _table_length(model.graph)
        context = rows or ASSUMED_CONTEXT
        why = f"its tables of positions have {rows} rows" if rows else f"{context} tokens are assumed"
        notes.append(f"no file beside the model says how long its context is; {why}")
    decoder = Decoder(
        family=sizes.family,
        vocabulary=vocabulary,
        hidden=_hidden(model.graph),
        context=context,
        layers=layers,
        parameters=sum(int(w.size) for w in weights if w.dtype.is_floating_point() or w.size > 1024),
        weight_bytes=sum(int(w.nbytes) for w in weights),
    )
    model.metadata_props[METADATA_KEY] = decoder.to_json()
    raised = Graph(model, weights_hash=graph.weights_hash, notes=notes)
    infer_shapes(raised)
    return raised


def _hidden(graph: ir.Graph) -> int:
    """Columns of the embedding table."""
    for value in graph.inputs:
        if value.name != "input_ids":
            continue
        todo = [value]
        while todo:
            for node, index in todo.pop().uses():
                if node.op_type in ("Unsqueeze", "Cast", "Reshape"):
                    todo.append(node.outputs[0])
                elif node.op_type == "Gather" and index == 1 and node.inputs[0] is not None:
                    table: ir.Value | None = node.inputs[0]
                    while table is not None and table.const_value is None:
                        maker = table.producer()
                        table = maker.inputs[0] if maker is not None and maker.inputs else None
                    if table is not None and table.const_value is not None:
                        return int(table.const_value.shape.numpy()[-1])
    return 0


def _table_length(graph: ir.Graph) -> int:
    """Rows of the tables of positions (rotary, learnt), the smallest; 0 where there are none."""
    rows = []
    for node in graph:
        table, index = (node.inputs[0], node.inputs[1]) if node.op_type == "Gather" else (None, None)
        if table is None or index is None or table.const_value is None:
            continue
        at: ir.Value | None = index
        while at is not None and at.name != "positions":
            maker = at.producer()
            at = maker.inputs[0] if maker is not None and maker.inputs else None
        if at is not None:
            rows.append(int(table.const_value.shape.numpy()[0]))
    return min(rows, default=0)
