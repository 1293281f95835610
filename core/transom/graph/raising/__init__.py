"""Raises a decoder that another program exported to the neutral decoder with `transom::CachedAttention`.

Exporters write attention in many ways (standard `Attention` with or without past, `com.microsoft::GroupQueryAttention`,
MatMul and Softmax by torch or Optimum), and a pattern matcher would misread the next one. So this pass computes: it
runs the graph without its weights for a few lengths to find masks, positions and shapes, locates each layer's attention
between its cache and its output, runs those nodes on random numbers, and replaces them only if the operator gives the
same result.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from transom.graph.graph import Graph
from transom.graph.raising.abstract import AbstractInterpreter, Facts
from transom.graph.raising.lengths import CacheInput, Lengths, facts_of_inputs, find_caches, find_ids
from transom.graph.raising.reasons import CannotRaise
from transom.graph.raising.rewriting import Rewriter, require_positions_only
from transom.graph.raising.sites import find_sites
from transom.graph.raising.tidying import fold, inline_known_branches, leftovers, simplify
from transom.graph.raising.verifying import AttentionSpec, AttentionVerifier, Layout, layout_of
from transom.graph.raising.widening import widen
from transom.graph.shapes import infer_shapes
from transom.signature import METADATA_KEY, Decoder

__all__ = ["CannotRaise", "DecoderHints", "looks_like_decoder", "raise_decoder"]

LENGTHS = (Lengths(3, 5), Lengths(7, 0), Lengths(1, 1), Lengths(2, 11))
FAR_PAST = 1 << 16
"""Past length for finding sliding windows if the context is unknown: longer than most windows."""
ASSUMED_CONTEXT = 4096
MAX_FAR_PAST = 1 << 18


@dataclass(frozen=True)
class DecoderHints:
    """Facts about a model from the files next to it; 0 or empty if they do not state them."""

    family: str = "onnx"
    context: int = 0


def looks_like_decoder(graph: Graph) -> bool:
    """Whether the graph has caches: inputs that are appended to and returned as outputs."""
    return bool(find_caches(graph.model.graph))


def raise_decoder(graph: Graph, hints: DecoderHints | None = None) -> Graph:
    """The same model with the standard decoder inputs and outputs.

    Args:
        graph: a neutral graph with its exporter's inputs and outputs; not changed.
        hints: the model's family and context, if known.

    Raises:
        CannotRaise: the graph is not a decoder with a cache, or its form is not recognized; the message says why.
    """
    hints = hints or DecoderHints()
    model = graph.model.clone()
    notes = list(graph.notes)
    if widen(model):
        notes.append("activations are computed in float32; 16-bit weights are unchanged")
    ids = find_ids(model.graph)
    _choose_branches(model, ids)
    caches = find_caches(model.graph)
    far = Lengths(2, min(max(hints.context, 64), MAX_FAR_PAST) + 3 if hints.context else FAR_PAST)
    facts = _facts(model, ids, caches, far)
    if not caches:
        raise CannotRaise("it has no cache of keys and values that a step could append to")
    sites = find_sites(model.graph, caches, facts[LENGTHS[0]])
    verifiers = [AttentionVerifier(site, facts, (far, facts[far])) for site in sites]
    specs = [verifier.spec() for verifier in verifiers]
    near = {k: v for k, v in facts.items() if k != far}
    logits = _logits(model.graph, caches)
    layout = _logits_layout(logits, near)
    vocabulary = next(d for d in reversed(layout.shape) if d > 0)

    old = list(model.graph.inputs)
    dropped = [str(v.name) for v in model.graph.outputs if v is not logits and v not in [c.present for c in caches]]
    rewriter = Rewriter(model, near, old)
    rewriter.position_values([v for v in old if v is not ids])
    rewriter.ids(ids)
    for verifier, spec in zip(verifiers, specs, strict=True):
        rewriter.attention(verifier.site, spec, verifier.layouts)
    rewriter.logits(logits, layout, vocabulary)
    rewriter.caches(specs)
    rewriter.editor.finish_edit()
    fold(rewriter.editor, near)
    rewriter.rotations()
    rewriter.editor.finish_edit()
    infer_shapes(Graph(model, weights_hash=""))
    simplify(rewriter.editor)
    readers = leftovers(model)
    for value in old:
        if str(value.name) in readers:
            node = readers[str(value.name)]
            name = str(value.name).removesuffix(".before")
            raise CannotRaise(f"the node {node.name} ({node.op_type}) still depends on the input {name}")
        model.graph.inputs.remove(value)
    require_positions_only(model, near)
    if dropped:
        notes.append(f"outputs removed: {', '.join(dropped)}")
    return _finish(graph, model, specs, hints, vocabulary, notes)


def _choose_branches(model: ir.Model, ids: ir.Value) -> None:
    """Inline branches whose condition is known; of Optimum's merged decoders, the branch with a cache."""
    while any(n.op_type == "If" and not n.domain for n in model.graph):
        caches = find_caches(model.graph)
        interpreter = AbstractInterpreter(model)
        facts = {
            choice: interpreter.run(facts_of_inputs(model.graph, ids, caches, choice, strict=False))
            for choice in LENGTHS
        }
        if not inline_known_branches(model, facts):
            return


def _facts(model: ir.Model, ids: ir.Value, caches: list[CacheInput], far: Lengths) -> dict[Lengths, Facts]:
    interpreter = AbstractInterpreter(model)
    return {lengths: interpreter.run(facts_of_inputs(model.graph, ids, caches, lengths)) for lengths in (*LENGTHS, far)}


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
        raise CannotRaise("it outputs the logits of the last token only: export it with the logits of all tokens")
    layout = layout_of(logits, facts)
    if len([d for d in layout.shape if d > 1]) != 1 or layout.shape[-1] == -1:
        raise CannotRaise(f"its logits have the shape {list(layout.shape)}")
    return layout


def _finish(
    graph: Graph, model: ir.Model, specs: list[AttentionSpec], hints: DecoderHints, vocabulary: int, notes: list[str]
) -> Graph:
    weights = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    context = hints.context
    if not context:
        rows = _table_length(model.graph)
        context = rows or ASSUMED_CONTEXT
        why = f"its position tables have {rows} rows" if rows else f"{context} tokens are assumed"
        notes.append(f"no file next to the model states its context; {why}")
    decoder = Decoder(
        family=hints.family,
        vocabulary=vocabulary,
        hidden=_hidden(model.graph),
        context=context,
        layers=tuple(spec.cache for spec in specs),
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
    """Rows of the smallest position table (rotary or learned); 0 if there is none."""
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
