"""Sparse attention in static shapes chooses what the reference chooses, and reads nothing else.

Draws: `clear` draws again until no choice is closer to another one than float32 rounding. What float16 costs has no
formula: one of eight draws must be within the bound (`redraws.one_within`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from parted import parted, reference
from redraws import one_within, without_close_choices
from running import Running, session

from transom.graph import Graph
from transom.graph.sparse import with_sparsity
from transom.ops import Array
from transom.ops.sparse_routing import ScoreParams, route
from transom.preparation.agreement import Agreement, compare
from transom.programs.onnx_writing import BOOL, FLOAT, INT64, OnnxWriter
from transom.programs.reading import GraphReader, UnsupportedNode
from transom.signature import LayerCache
from transom.sparsity import Sparsity
from transom.testing.models import tiny_decoder
from transom_tensorrt import attention, sparse
from transom_tensorrt.lowering import RtxKernels
from transom_tensorrt.precision import RtxPrecision

CONTEXT = 640
STATIC = Sparsity(1.0, columns=0, top_k=4, dense_below=0, max_density=0.6)
POLICIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "units of 16": ({}, {}),
    "units of 32": ({}, {"unit": 32, "rows": 8, "top_k": 2}),
    "nodes of 16": ({}, {"node": 16, "top_k": 3}),
    "a wide window": ({}, {"local_window": 128, "top_k": 3}),
    "dense by density": ({}, {"max_density": 1.0}),
    "dense below 200": ({}, {"dense_below": 200}),
    "sliding window": ({"window": 150}, {"top_k": 3}),
    "soft cap and sinks": ({"softcap": 4.0, "sinks": True}, {}),
    "wide values": ({"value_dim": 32}, {}),
    "some heads dense": ({}, {"heads": ((1.0, 0.0), (0.0, 1.0))}),
    "a layer dense": ({}, {"heads": ((0.0, 0.0), (1.0, 1.0))}),
    "one head": ({"q_heads": 3, "kv_heads": 1}, {"top_k": 2}),
}
"""Forms of the decoder and fields of the policy."""


CLOSE = 1e-5
"""A choice with a smaller margin may turn out differently where float32 sums are in another order."""


def clear(rng: np.random.Generator, graph: Graph, lengths: Sequence[int]) -> tuple[list[list[int]], Array]:
    """Random parts of these lengths of which no choice is a near one, and the reference's logits of them."""

    def draw() -> tuple[list[list[int]], Array]:
        parts = parted(rng, 61, lengths)
        return parts, reference(graph, parts)

    return without_close_choices(draw, CLOSE)


def policy(**fields: Any) -> Sparsity:
    from dataclasses import replace

    return replace(STATIC, **fields)


@pytest.mark.parametrize("which", POLICIES)
def test_a_decoder_reads_what_the_reference_reads(which: str, rng: np.random.Generator, tmp_path: Path) -> None:
    form, fields = POLICIES[which]

    def measure(draw: int) -> Agreement:
        dense = tiny_decoder(rng, context=CONTEXT, **form)
        graph = with_sparsity(dense, policy(**fields))
        parts, wanted = clear(rng, graph, [270, 33, 67, *[1] * 40])  # parts that begin and end inside blocks
        got = Running(graph, RtxPrecision("float32"), CONTEXT, tmp_path / f"exact {draw}").logits(parts)
        assert np.abs(got - wanted).max() < 1e-3
        assert compare(wanted, reference(dense, parts)).kl_mean > 1e-6  # the policy changes the logits
        half = Running(graph, RtxPrecision("float16"), CONTEXT, tmp_path / f"half {draw}").logits(parts)
        return compare(wanted, half)  # float16 may change a choice

    one_within(measure, lambda half: half.kl_mean < 1e-4)


def test_each_sequence_of_a_batch_makes_its_own_choice(rng: np.random.Generator, tmp_path: Path) -> None:
    graph = with_sparsity(tiny_decoder(rng, context=CONTEXT), policy(top_k=2))
    lengths = [300, 40, 411]
    drawn = [clear(rng, graph, [length, 1]) for length in lengths]
    texts, more = ([parts[i] for parts, _ in drawn] for i in range(2))
    running = Running(graph, RtxPrecision("float32"), CONTEXT, tmp_path)
    caches = running.start(3)
    for i, text in enumerate(texts):
        own = {name: value[i : i + 1].copy() for name, value in caches.items()}
        running.step(own, [text], [0])
        for name, value in own.items():
            caches[name][i] = value[0]
    logits = running.step(caches, more, lengths)
    for i, (_, wanted) in enumerate(drawn):
        assert np.abs(logits[i] - wanted[-1]).max() < 1e-3


# ---------------------------------------------------------------------------------------------------- the choice itself


def chosen(
    rule: Sparsity, queries: np.ndarray[Any, Any], keys: np.ndarray[Any, Any], window: int, folder: Path, capacity: int
) -> tuple[Any, ...]:
    """The network's choice for the last queries [T, K, G, D] over keys [n, K, D]: begin and end of each block, its
    units before the local window, and which of them are read."""
    tokens, heads, group, columns = queries.shape
    past = len(keys) - tokens
    w = OnnxWriter("choice")
    ids = w.input("input_ids", INT64, ("batch", "tokens"))
    before = w.input("past", INT64, ("batch",))
    sizes = sparse.SparseSizes(rule, capacity)
    b = sparse.Blocks(w, before, ids, sizes)
    cache = LayerCache(heads * group, heads, columns, columns, window)
    layer = attention.LayerAttention(cache, columns**-0.5, 0.0, None)
    part = sparse.SparseHeads(layer, tuple(range(heads)), heads)
    q = w.input("q", FLOAT, ("rows", heads * group * columns))
    held = w.input("keys", FLOAT, ("batch", heads, capacity, columns))
    nodes = [w.input(n, FLOAT, ("batch", heads, sizes.nodes, columns)) for n in ("means", "variances")]
    blocks = w("Div", b.far_end, w.ints(64))
    inside = w("Add", w("Unsqueeze", blocks, w.ints([2])), w.constant(np.arange(sizes.local + 1, dtype=np.int64)))
    inside = w("Unsqueeze", w("Min", inside, w.ints(capacity // 64 - 1)), w.ints([1]))
    rows = b.rows_of_cache(inside, part, capacity // 64)
    flat = w("Gather", w("Reshape", held, w.ints([-1, 64 * columns])), rows, axis=0)
    near = w("Reshape", flat, b.shape(b.batch, heads, b.blocks, sizes.near, columns))
    far, taken = sparse._choice(b, layer, q, near, nodes[0], nodes[1], window)
    for name, value in (("far", far), ("taken", w.cast(taken, INT64)), ("begin", b.begin), ("end", b.end)):
        w.output(w("Identity", value), name, [f"{name}{i}" for i in range(4 if name in ("far", "taken") else 2)])
    whole = np.zeros((capacity + 64, heads, columns), np.float32)
    whole[: len(keys)] = keys
    by_node = whole.reshape(-1, rule.node, heads, columns)
    inputs = {
        "input_ids": np.zeros((1, tokens), np.int64), "past": np.array([past]), "q": queries.reshape(tokens, -1),
        "keys": whole[:capacity].transpose(1, 0, 2)[None], "means": by_node.mean(1).transpose(1, 0, 2)[None],
        "variances": by_node.var(1).transpose(1, 0, 2)[None],
    }  # fmt: skip
    return tuple(session(w.model(), folder).run(["far", "taken", "begin", "end"], inputs))


@pytest.mark.parametrize("tokens", [1, 40, 150])
@pytest.mark.parametrize("window", [0, 200])
@pytest.mark.parametrize("fields", [{}, {"unit": 32}, {"dense_below": 256}, {"max_density": 1.0}], ids=str)
def test_the_choice_agrees_with_the_reference(
    tokens: int, window: int, fields: dict[str, Any], rng: np.random.Generator, tmp_path: Path
) -> None:
    rule, heads, group, columns, capacity = policy(**fields), 2, 3, 16, 512
    count = int(rng.integers(tokens + 180, 500))
    keys = rng.standard_normal((count, heads, columns)).astype(np.float32)
    queries = (2 * rng.standard_normal((tokens, heads, group, columns))).astype(np.float32)
    far, taken, begin, end = chosen(rule, queries, keys, window, tmp_path, capacity)
    checked = 0
    for head in range(heads):
        scores = ScoreParams(columns**-0.5, window=window)
        wanted = route(queries[:, head], keys[:, head], rule.layer(0), head, scores)
        by_begin = {int(at): i for i, at in reversed(list(enumerate(begin[0])))}
        for block in wanted.blocks:
            i = by_begin[block.begin]
            assert end[0, i] == block.end
            far_end = max(0, block.begin // 64 - 1) * 64
            units = {int(u) for u, t in zip(far[0, head, i], taken[0, head, i], strict=True) if t}
            start = max(0, block.begin - window + 1) if window else 0
            expected = {int(u) for u in block.units if start - rule.unit < u * rule.unit < far_end}
            if block.margin < 1e-4:
                continue  # another order of summation may choose otherwise
            assert {u for u in units if (u + 1) * rule.unit > start} == {
                u for u in expected if (u + 1) * rule.unit > start
            }, f"block at {block.begin}, {count} keys"
            checked += 1
    assert checked


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (Sparsity(0.9), "use top_k=…"), (Sparsity(1.0, top_k=4), "use columns=0"),
        (Sparsity(1.0, top_k=4, columns=0, score="mean"), "not by 'mean'"),
    ],
)  # fmt: skip
def test_policies_without_static_shapes_are_refused(asked: Sparsity, reason: str, rng: np.random.Generator) -> None:
    with pytest.raises(UnsupportedNode, match=reason):
        GraphReader(with_sparsity(tiny_decoder(rng, context=CONTEXT), asked), RtxKernels())


@pytest.mark.parametrize(
    "fields", [{}, {"max_density": 1.0}, {"dense_below": 1024, "top_k": 64}, {"unit": 64}], ids=str
)
def test_there_is_room_for_blocks_that_read_everything(fields: dict[str, Any]) -> None:
    """Of any number of keys: those of a block that reads all of them, by the rules, fit into its units."""
    rule = policy(**fields)
    sizes = sparse.SparseSizes(rule, 8192)
    for end in range(8192):
        far = max(0, end // 64 - sizes.local) * 64
        reads = min(far, (rule.top_k + 64 // rule.unit) * rule.unit) + end + 1 - far
        dense = end < rule.dense_below or (sizes.dense_by_density and reads * 5 > (end + 1) * 3)
        if dense:
            assert far <= sizes.far * rule.unit, end


def test_values_of_a_written_graph_know_their_types() -> None:
    w = OnnxWriter("types")
    x = w.input("x", FLOAT, (1,))
    assert w("Greater", x, w.number(0.0, FLOAT), dtype=BOOL).dtype == BOOL
    assert w.cast(x, FLOAT) is x
    assert w.cast(x, INT64).dtype == INT64
    assert w.ints(3) is w.ints(3)
    assert isinstance(w.model(), ir.Model)
