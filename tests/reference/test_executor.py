"""The NumPy executor: streamed weights, control flow, checked inputs, outputs owned by the caller.

Draws: float32 sums in another order differ by about 1e-6 of their size; the tolerances are ten times that or more.
"""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from transom.errors import UnsupportedError
from transom.graph import Blocked, BlockedArrays, Dense, Graph, GraphBuilder
from transom.graph.weights import dense
from transom.reference.executor import Executor
from transom.sessions.inputs import decoder_inputs, empty_cache
from transom.testing.bench import ReferenceOracle
from transom.testing.models import VARIANTS, tiny_decoder

WIDTH = 512
LAYERS = 12


def chain(live: list[weakref.ref[Any]], reads: list[int]) -> Graph:
    """LAYERS square matrices of 1 MB, each made when it is loaded; `live` and `reads` say what happens to them."""

    def load(index: int) -> np.ndarray:  # type: ignore[type-arg]
        array = np.full((WIDTH, WIDTH), 1 / WIDTH, np.float32)
        live.append(weakref.ref(array))
        reads[index] += 1
        return array

    b = GraphBuilder("chain")
    x = b.input("x", "float32", ["n", WIDTH])
    for i in range(LAYERS):
        x = b.linear(x, Dense((WIDTH, WIDTH), "float32", lambda i=i: load(i)), f"layers.{i}")  # type: ignore[misc]
    b.output(x, "y")
    return b.finish(weights_hash="w")


def test_weights_stream_through_and_none_is_held() -> None:
    live: list[weakref.ref[Any]] = []
    reads = [0] * LAYERS
    executor = Executor(chain(live, reads))
    x = np.ones((2, WIDTH), np.float32)
    executor.run({"x": x})  # the first run also imports and caches other things
    reads[:] = [0] * LAYERS
    live.clear()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    executor.run({"x": x})
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    gc.collect()
    assert not [r for r in live if r() is not None], "weights are held after the run"
    assert reads == [1] * LAYERS
    assert peak < 4 * WIDTH * WIDTH * 4, f"{peak} bytes for matrices of {WIDTH * WIDTH * 4}"


def test_kept_weights_are_read_once_for_all_runs() -> None:
    live: list[weakref.ref[Any]] = []
    reads = [0] * LAYERS
    executor = Executor(chain(live, reads), keep_weights=True)
    x = np.ones((2, WIDTH), np.float32)
    first = executor.run({"x": x})["y"]
    np.testing.assert_array_equal(executor.run({"x": x})["y"], first)
    assert reads == [1] * LAYERS


@pytest.mark.parametrize("variant", VARIANTS)
def test_streaming_and_keeping_compute_the_same(variant: str, rng: np.random.Generator) -> None:
    graph = tiny_decoder(rng, **VARIANTS[variant])
    tokens = rng.integers(0, 61, 7).tolist()
    oracle = ReferenceOracle(graph)
    wanted = oracle.logits(tokens)
    oracle._executor, oracle._known = Executor(graph), {}
    np.testing.assert_allclose(oracle.logits(tokens), wanted, rtol=1e-5, atol=1e-6)


def test_rows_of_an_embedding_are_read_in_the_type_of_the_table(rng: np.random.Generator) -> None:
    half = rng.standard_normal((9, 32)).astype(np.float16)
    quants = rng.integers(-128, 128, (9, 32)).astype(np.int8)
    blocks = BlockedArrays(quants, np.full((9, 1), 0.5, np.float16))
    for table, wanted, types in (
        (dense(half), half, {"rows": np.float32, "half": np.float16}),
        (Blocked((9, 32), 32, "int8", "float16", lambda: blocks), quants * np.float32(0.5), {"rows": np.float32}),
    ):
        b = GraphBuilder("embedding")
        ids = b.input("ids", "int64", ["n"])
        stored = b.weight(table, "table")
        b.output(b.op("Gather", stored, ids, axis=0), "rows")
        if "half" in types:  # the table itself, before it is cast
            node = stored.producer()
            assert node is not None
            assert node.op_type == "Cast"
            b.output(b.op("Gather", node.inputs[0], ids, axis=0), "half")
        graph = b.finish(weights_hash="w")
        given = {"ids": rng.integers(0, 9, 5)}
        for executor in (Executor(graph), Executor(graph, keep_weights=True)):
            outputs = executor.run(given)
            assert {name: array.dtype for name, array in outputs.items()} == types
            for array in outputs.values():
                np.testing.assert_array_equal(array, wanted[given["ids"]])


def test_missing_unknown_and_mistyped_inputs_are_named() -> None:
    b = GraphBuilder("inputs")
    b.output(b.op("Add", b.input("a", "float32", ["n"]), b.input("b", "float32", ["n"])), "y")
    executor = Executor(b.finish(weights_hash="w"))
    one = np.ones(2, np.float32)
    with pytest.raises(ValueError, match="missing inputs: b"):
        executor.run({"a": one})
    with pytest.raises(ValueError, match="unknown inputs: c"):
        executor.run({"a": one, "b": one, "c": one})
    with pytest.raises(ValueError, match="the input b is int64; the graph takes float32"):
        executor.run({"a": one, "b": np.ones(2, np.int64)})
    assert executor.run({"a": [1.0, 2.0], "b": one})["y"].dtype == np.float32
    with pytest.raises(ValueError, match="Add"):
        executor.run({"a": one, "b": np.ones(3, np.float32)})


class _OnlyDLPack:
    """A tensor of an engine that can be read only through DLPack."""

    def __init__(self, array: np.ndarray) -> None:  # type: ignore[type-arg]
        self._array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()


def test_inputs_are_read_through_dlpack() -> None:
    b = GraphBuilder("dlpack")
    b.output(b.op("Neg", b.input("x", "float32", ["n"])), "y")
    y = Executor(b.finish(weights_hash="w")).run({"x": _OnlyDLPack(np.float32([1, 2]))})["y"]
    np.testing.assert_array_equal(y, np.float32([-1, -2]))


@pytest.mark.parametrize("keep", [True, False])
def test_outputs_alias_neither_inputs_nor_weights(keep: bool) -> None:
    b = GraphBuilder("aliases")
    x = b.input("x", "float32", ["n", 4])
    b.output(b.op("Reshape", x, b.constant([-1])), "view")
    b.output(b.op("Identity", b.weight(dense(np.ones((3, 4), np.float32)), "w")), "weight")
    executor = Executor(b.finish(weights_hash="w"), keep_weights=keep)
    given = np.ones((2, 4), np.float32)
    first = executor.run({"x": given})
    for array in first.values():
        array[...] = 7
    np.testing.assert_array_equal(given, 1)
    for array in executor.run({"x": given}).values():
        np.testing.assert_array_equal(array, 1)


def value(name: str, dtype: ir.DataType = ir.DataType.FLOAT, shape: Sequence[int | str] = ("n",)) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def node(op: str, inputs: Sequence[ir.Value], name: str, domain: str = "", **attributes: Any) -> ir.Node:
    given = [ir.convenience.convert_attribute(k, v) for k, v in attributes.items()]
    made = ir.Node(domain, op, inputs, given, name=name, num_outputs=1)
    made.outputs[0].name = f"{name}.out"
    return made


def branching(then_op: str = "Neg", domain: str = "") -> Graph:
    b = GraphBuilder("if")
    x, condition = b.input("x", "float32", ["n"]), b.input("condition", "bool", [])
    hidden = b.op("Add", x, x)  # used by one branch only, so it must live until then
    then, other = node(then_op, [hidden], "then", domain), node("Tanh", [x], "other")
    y = b.op(
        "If", condition,
        then_branch=ir.Graph([], then.outputs, nodes=[then], name="then"),
        else_branch=ir.Graph([], other.outputs, nodes=[other], name="other"),
    )  # fmt: skip
    y.type = ir.TensorType(ir.DataType.FLOAT)
    b.output(y, "y", ["n"])
    return b.finish(weights_hash="w")


def test_if_runs_the_branch_that_its_condition_says(rng: np.random.Generator) -> None:
    executor = Executor(branching())
    x = rng.standard_normal(4).astype(np.float32)
    np.testing.assert_array_equal(executor.run({"x": x, "condition": True})["y"], -(x + x))
    np.testing.assert_allclose(executor.run({"x": x, "condition": np.array(False)})["y"], np.tanh(x), rtol=1e-6)


def test_loop_carries_values_collects_scans_and_reads_the_outer_graph(rng: np.random.Generator) -> None:
    b = GraphBuilder("loop")
    x, step, count = b.input("x", "float32", [3]), b.input("step", "float32", [3]), b.input("count", "int64", [])
    index, going, carried = (
        value("i", ir.DataType.INT64, ()), value("going", ir.DataType.BOOL, ()), value("carried", shape=(3,)),
    )  # fmt: skip
    add, keep, scan = (
        node("Add", [carried, step], "add"),
        node("Identity", [going], "keep"),
        node("Neg", [carried], "scan"),
    )
    body = ir.Graph(
        [index, going, carried],
        [keep.outputs[0], add.outputs[0], scan.outputs[0]],
        nodes=[add, keep, scan],
        name="body",
    )
    outputs = b.nodes("Loop", count, None, x, outputs=2, body=body)
    for name, output in zip(("last", "scans"), outputs, strict=True):
        output.type = ir.TensorType(ir.DataType.FLOAT)
        b.output(output, name)
    executor = Executor(b.finish(weights_hash="w"))
    given, by = rng.standard_normal(3).astype(np.float32), rng.standard_normal(3).astype(np.float32)
    result = executor.run({"x": given, "step": by, "count": np.int64(4)})
    np.testing.assert_allclose(result["last"], given + 4 * by, rtol=1e-5)
    np.testing.assert_allclose(result["scans"], -np.stack([given + i * by for i in range(4)]), rtol=1e-5)
    np.testing.assert_array_equal(executor.run({"x": given, "step": by, "count": np.int64(0)})["last"], given)


def test_operators_without_a_reference_are_named_before_anything_runs() -> None:
    with pytest.raises(UnsupportedError, match=r"nobody\.knows::Riddle"):
        Executor(branching("Riddle", "nobody.knows"))
    b = GraphBuilder("scan")
    x = b.input("x", "float32", ["n", 3])
    inner = value("row", shape=(3,))
    neg = node("Neg", [inner], "neg")
    scan = b.op("Scan", x, num_scan_inputs=1, body=ir.Graph([inner], neg.outputs, nodes=[neg], name="body"))
    scan.type = ir.TensorType(ir.DataType.FLOAT)
    b.output(scan, "y")
    with pytest.raises(UnsupportedError, match="Scan has a subgraph"):
        Executor(b.finish(weights_hash="w"))


def test_chains_of_constants_are_computed_once() -> None:
    """a + a, forty times over: recomputing each operand for each use would take 2⁴⁰ additions."""
    b = GraphBuilder("doubling")
    x = b.input("x", "float32", [])
    total = b.constant(np.float32(1))
    for _ in range(40):
        total = b.op("Add", total, total)
    b.output(b.op("Mul", x, total), "y")
    assert Executor(b.finish(weights_hash="w")).run({"x": np.float32(1)})["y"] == np.float32(2.0**40)


def test_random_operators_are_drawn_once_for_all_their_readers() -> None:
    b = GraphBuilder("random")
    draw = b.op("RandomNormalLike", b.constant(np.zeros(8, np.float32)))
    draw.type = ir.TensorType(ir.DataType.FLOAT)
    b.output(b.op("Sub", draw, draw), "zero")
    np.testing.assert_array_equal(Executor(b.finish(weights_hash="w")).run({})["zero"], np.zeros(8, np.float32))


def test_progress_reaches_the_end(rng: np.random.Generator) -> None:
    shares: list[float] = []
    b = GraphBuilder("progress")
    x = b.input("x", "float32", ["n"])
    b.output(b.op("Neg", b.op("Tanh", x)), "y")
    Executor(b.finish(weights_hash="w")).run({"x": np.zeros(2, np.float32)}, progress=shares.append)
    assert shares == [0.5, 1.0]


def test_errors_name_the_node(rng: np.random.Generator) -> None:
    b = GraphBuilder("errors")
    x, y = b.input("x", "float32", ["n", "m"]), b.input("y", "float32", ["m", "k"])
    with b.scope("layers.3"):
        b.output(b.op("MatMul", x, y, name="down"), "z")
    executor = Executor(b.finish(weights_hash="w"))
    with pytest.raises(ValueError, match=r"node layers\.3\.down \(MatMul\)"):
        executor.run({"x": np.ones((2, 3), np.float32), "y": np.ones((4, 2), np.float32)})


def test_an_observer_sees_each_node_with_what_it_read_and_made(rng: np.random.Generator) -> None:
    graph = tiny_decoder(rng)
    seen: dict[str, tuple[Sequence[Any], Sequence[Any]]] = {}

    def observe(node: ir.Node, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        assert len(inputs) == len(node.inputs)
        seen[str(node.name)] = inputs, outputs

    assert graph.decoder is not None
    executor = Executor(graph)
    inputs = decoder_inputs([range(5)], range(5), empty_cache(graph.decoder))
    logits = executor.run(inputs, observe=observe)["logits"]
    assert set(seen) == {str(n.name) for n in graph.nodes()} - {"embedding"}
    left, right = seen["layers.0.q"][0]
    np.testing.assert_array_equal(left @ right, seen["layers.0.q"][1][0])
    np.testing.assert_array_equal(seen["head"][1][0], logits)
    seen.clear()
    executor.run(inputs)
    assert not seen, "an observer is for one run"
