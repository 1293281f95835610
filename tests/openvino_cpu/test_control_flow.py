"""Graphs with If and Loop, which OpenVINO's ONNX frontend reads as a whole, from the file to the answer.

Draws: float32 sums in another order differ by about 1e-6 of their size; the tolerances are ten times that or more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx_models import Writer, adding_loop, value

import transom
from transom import hardware
from transom.artifacts import Cache
from transom.graph import Graph
from transom.sources import resolve
from transom_openvino_cpu import OpenVinoCpu, trial

BOOL, INT = TensorProto.BOOL, TensorProto.INT64


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def save(model: Any, path: Path) -> Path:
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    assert trial.whole_through_frontend(resolve(path).open(path).graph)
    return path


def assert_same(got: Any, wanted: Any) -> None:
    assert set(got) == set(wanted)
    for name, array in wanted.items():
        assert np.shape(got[name]) == np.shape(array)
        np.testing.assert_allclose(got[name], array, rtol=1e-6, atol=1e-6)


def as_onnx_says(model: Any, inputs: Any) -> dict[str, Any]:
    return dict(zip((o.name for o in model.graph.output), ReferenceEvaluator(model).run(None, inputs), strict=True))


def with_if(rng: np.random.Generator) -> Any:
    """Branches of several nodes that read the outer graph, and an If inside one."""

    def branch(name: str, op_type: str, *more: Any) -> Any:
        weight = numpy_helper.from_array(rng.standard_normal(4).astype(np.float32), f"{name}.w")
        nodes = [helper.make_node(op_type, ["scaled", f"{name}.w"], [f"{name}.sum"]), *more]
        last = more[-1].output[0] if more else f"{name}.sum"
        return helper.make_graph(nodes, name, [], [value(last, shape=["n", 4])], [weight])

    inner = helper.make_node(
        "If", ["deeper"], ["inner.y"], then_branch=branch("deep", "Mul"), else_branch=branch("flat", "Add")
    )
    w = Writer(rng)
    w.op("Mul", "x", w.constant(np.float32(2)), outputs=["scaled"])
    outer, other = branch("then", "Add", inner), branch("else", "Sub")
    w.op("If", "which", then_branch=outer, else_branch=other, outputs=["chosen"])
    w.op("Tanh", "chosen", outputs=["y"])
    inputs = [value("x", shape=["n", 4]), value("which", BOOL, []), value("deeper", BOOL, [])]
    return w.model(inputs, [value("y", shape=["n", 4])])


def test_a_graph_with_if_takes_the_branch_that_its_condition_says(
    cache: Cache, tmp_path: Path, rng: np.random.Generator
) -> None:
    model = with_if(rng)
    path = save(model, tmp_path / "if.onnx")
    with transom.load(path, backend="openvino_cpu", device="cpu", cache=cache) as loaded:
        assert loaded.report.check.startswith("passed")
        for rows, which, deeper in ((2, True, True), (3, True, False), (1, False, True), (2, True, True)):
            inputs = {
                "x": rng.standard_normal((rows, 4)).astype(np.float32),
                "which": np.asarray(which),
                "deeper": np.asarray(deeper),
            }
            assert_same(loaded.run(inputs), as_onnx_says(model, inputs))


def turning(rng: np.random.Generator, *, count: str = "", condition: str = "", collects: bool) -> Any:
    """A Loop whose count and condition are inputs of the graph where they are named."""
    nodes = [helper.make_node("Add", ["in", "step"], ["out"]), helper.make_node("Identity", ["c"], ["more"])]
    results = [value("more", BOOL, []), value("out", shape=[3])]
    if collects:
        nodes.append(helper.make_node("Neg", ["out"], ["collected"]))
        results.append(value("collected", shape=[3]))
    body = helper.make_graph(
        nodes, "body", [value("i", INT, []), value("c", BOOL, []), value("in", shape=[3])], results
    )
    w = Writer(rng)
    given = [value("x", shape=[3])]
    given += [value(count, INT, [])] if count else []
    given += [value(condition, BOOL, [])] if condition else []
    w.weights.append(numpy_helper.from_array(rng.standard_normal(3).astype(np.float32), "step"))
    outputs = [value("total", shape=[3]), value("steps", shape=["k", 3])][: 1 + collects]
    first = [count or w.constant(np.int64(3)), condition or w.constant(np.bool_(True))]
    w.op("Loop", *first, "x", body=body, outputs=[o.name for o in outputs])
    return w.model(given, outputs)


def test_a_graph_with_loop_turns_until_its_condition_or_its_count_ends_it(
    cache: Cache, tmp_path: Path, rng: np.random.Generator
) -> None:
    model = adding_loop(rng, 9)
    path = save(model, tmp_path / "loop.onnx")
    turns = set()
    with transom.load(path, backend="openvino_cpu", device="cpu", cache=cache) as loaded:
        assert loaded.report.check.startswith("passed")
        for largest in (1.1, 3.0, 0.1, 5.0, 1.1):
            x = (rng.uniform(0.1, 1, 3) * largest).astype(np.float32)
            x[rng.integers(3)] = -largest
            got = loaded.run({"x": x})
            assert_same(got, as_onnx_says(model, {"x": x}))
            turns.add(len(got["steps"]))
    assert turns == {4, 2, 9, 1}


def test_a_loop_that_turns_no_times_gives_what_it_began_with(
    cache: Cache, tmp_path: Path, rng: np.random.Generator
) -> None:
    model = turning(rng, count="n", condition="go", collects=False)
    path = save(model, tmp_path / "loop.onnx")
    with transom.load(path, backend="openvino_cpu", device="cpu", cache=cache) as loaded:
        for count, go in ((0, True), (2, True), (-5, True), (0, True), (-1, True), (3, False), (1, True)):
            inputs = {
                "x": rng.standard_normal(3).astype(np.float32),
                "n": np.asarray(count),
                "go": np.asarray(go),
            }
            assert_same(loaded.run(inputs), as_onnx_says(model, inputs))


def inside_if(model: Any) -> Any:
    """The graph of `turning` as the first branch of an If."""
    graph = model.graph
    outputs = [value("a", shape=[3]), value("b", shape=["k", 3])][: len(graph.output)]
    nodes = [helper.make_node("Identity", ["x"], ["same"]), helper.make_node("Unsqueeze", ["x", "zero"], ["rows"])]
    results = [value("same", shape=[3]), value("rows", shape=[1, 3])][: len(outputs)]
    zero = numpy_helper.from_array(np.zeros(1, np.int64), "zero")
    node = helper.make_node(
        "If",
        ["which"],
        [o.name for o in outputs],
        then_branch=helper.make_graph(graph.node, "then", [], graph.output, graph.initializer),
        else_branch=helper.make_graph(nodes[: len(outputs)], "else", [], results, [zero]),
    )
    outer = helper.make_graph([node], "outer", [*graph.input, value("which", BOOL, [])], outputs)
    return helper.make_model(outer, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def answers_of(graph: Graph) -> dict[str, str]:
    """Operator of each node -> why it is refused, empty where it is not."""
    cpu = next(d for d in hardware.probe_devices() if d.kind == "cpu")
    answers = {c.node: c.reason for c in OpenVinoCpu().claim(graph, cpu, {"precision": "auto"})}
    return {n.op_type: answers[str(n.name)] for n in graph.nodes()}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    ("free", "collects", "refused"),
    [
        ({"count": "n"}, True, True),
        ({"condition": "go"}, True, True),
        ({}, True, False),
        ({"count": "n", "condition": "go"}, False, False),
    ],
)
def test_a_loop_that_may_collect_nothing_is_refused_since_the_engine_would_answer_with_what_it_collected_before(
    free: dict[str, str], collects: bool, refused: bool, inside: bool, tmp_path: Path, rng: np.random.Generator
) -> None:
    model = turning(rng, **free, collects=collects)
    if inside:
        model = inside_if(model)
    path = save(model, tmp_path / "loop.onnx")
    reason = answers_of(resolve(path).open(path).graph)["If" if inside else "Loop"]
    assert ("values of the run before" in reason) == refused
    assert bool(reason) == refused


def test_auto_gives_a_loop_that_may_collect_nothing_to_the_reference(
    cache: Cache, tmp_path: Path, rng: np.random.Generator
) -> None:
    path = save(turning(rng, count="n", collects=True), tmp_path / "loop.onnx")
    with transom.load(path, device="cpu", cache=cache) as loaded:
        assert loaded.report.backend == "reference"
        x = rng.standard_normal(3).astype(np.float32)
        assert loaded.run({"x": x, "n": np.asarray(2)})["steps"].shape == (2, 3)
        nothing = np.zeros((0, 3), np.float32)
        assert_same(loaded.run({"x": x, "n": np.asarray(0)}), {"total": x, "steps": nothing})


def test_control_flow_beside_an_operator_that_the_frontend_cannot_read_is_refused_with_the_reason(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    import onnx_ir as ir

    path = save(with_if(rng), tmp_path / "if.onnx")
    graph = resolve(path).open(path).graph
    riddle = ir.node("Riddle", [graph.model.graph.outputs[0]], domain="nobody.knows", name="riddle")
    graph.model.graph.append(riddle)
    answers = answers_of(Graph(graph.model, weights_hash=""))
    assert answers.pop("If") == "control flow in a graph with operators that are not standard ONNX"
    assert answers.pop("Riddle") == "no OpenVINO form of nobody.knows::Riddle"
    assert set(answers.values()) == {""}
