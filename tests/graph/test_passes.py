"""Passes: calls replaced by bodies, selectively; unused parts removed; the input graph unchanged.

Draws: float32 sums in another order differ by about 1e-6 of their size; the tolerances are ten times that or more.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from transom.graph import Graph, GraphBuilder
from transom.graph.bodies import body_of, has_body
from transom.graph.passes import decompose, infer_types, inline_functions
from transom.ops import operators
from transom.reference.executor import Executor
from transom.testing.bench import ReferenceOracle
from transom.testing.checks.operators import expected
from transom.testing.models import VARIANTS, tiny_decoder
from transom.testing.one_node import NODE, one_node


def attention_nodes(graph: Graph) -> list[str]:
    return [str(n.name) for n in graph.nodes() if n.op_type == "CachedAttention"]


@pytest.mark.parametrize("variant", ["gqa", "window", "everything"])
def test_some_calls_of_one_function_are_decomposed_and_others_stay(variant: str, rng: np.random.Generator) -> None:
    graph = tiny_decoder(rng, layers=3, **VARIANTS[variant])  # layers 0 and 2 are alike if there is a window
    before, digest = attention_nodes(graph), graph.digest()
    tokens = rng.integers(0, 61, 10).tolist()
    wanted = ReferenceOracle(graph).logits(tokens)
    for chosen in (before[:1], before[1:2], before[::2], before):
        flat = decompose(graph, chosen)
        flat.check()
        assert attention_nodes(flat) == [n for n in before if n not in chosen]
        np.testing.assert_allclose(ReferenceOracle(flat).logits(tokens), wanted, rtol=1e-4, atol=1e-5)
    assert graph.digest() == digest, "the pass changed its input"


def test_decomposed_graph_can_be_decomposed_further(rng: np.random.Generator) -> None:
    graph = tiny_decoder(rng)
    once = decompose(graph, ["layers.0.attention"])
    twice = decompose(once, ["layers.1.attention"])
    again = decompose(twice, [str(n.name) for n in twice.nodes() if n.op_type == "Softmax"])
    again.check()
    assert not attention_nodes(again)
    assert not [n for n in again.nodes() if n.op_type == "Softmax"]
    tokens = rng.integers(0, 61, 6).tolist()
    np.testing.assert_allclose(
        ReferenceOracle(again).logits(tokens), ReferenceOracle(graph).logits(tokens), rtol=1e-4, atol=1e-5
    )


def test_new_nodes_are_named_for_the_call_they_replace(rng: np.random.Generator) -> None:
    flat = decompose(tiny_decoder(rng), ["layers.0.attention", "layers.1.attention"])
    names = [str(n.name) for n in flat.nodes()]
    assert len(set(names)) == len(names)
    for layer in (0, 1):
        assert f"layers.{layer}.attention.Softmax" in names
    assert not [n for n in flat.nodes() if "transom.call" in n.metadata_props]


@pytest.mark.parametrize("schema", list(operators()), ids=lambda s: s.name)
def test_onnx_bodies_of_standard_operators_compute_the_same(schema, rng: np.random.Generator) -> None:  # type: ignore[no-untyped-def]
    for sample in schema.samples(rng):
        graph, inputs = one_node(schema, sample)
        node = next(graph.nodes())
        if not has_body(graph.model, node):
            assert body_of(graph.model, node) is None
            continue
        flat = decompose(graph, [NODE])
        flat.check()
        assert schema.name not in {n.op_type for n in flat.nodes()}
        outputs = Executor(flat).run(inputs)
        for i, wanted in enumerate(expected(schema, sample)):
            np.testing.assert_allclose(outputs[f"y{i}"], wanted, rtol=1e-4, atol=1e-5)


def test_operators_that_onnx_defines_by_simpler_ones_have_bodies(rng: np.random.Generator) -> None:
    graph = tiny_decoder(rng)
    by_type = {n.op_type: has_body(graph.model, n) for n in graph.nodes()}
    assert all(by_type[op] for op in ("RMSNormalization", "RotaryEmbedding", "Swish", "CachedAttention"))
    assert not any(by_type[op] for op in ("MatMul", "Add", "Gather"))


def test_whole_decoder_without_any_operator_that_has_a_body(rng: np.random.Generator) -> None:
    graph = tiny_decoder(rng, **VARIANTS["everything"])
    flat = decompose(graph, [str(n.name) for n in graph.nodes() if has_body(graph.model, n)])
    flat.check()
    assert not {"RMSNormalization", "RotaryEmbedding", "Swish", "CachedAttention"} & {n.op_type for n in flat.nodes()}
    tokens = rng.integers(0, 61, 8).tolist()
    np.testing.assert_allclose(
        ReferenceOracle(flat).logits(tokens), ReferenceOracle(graph).logits(tokens), rtol=1e-4, atol=1e-5
    )


def test_unknown_names_and_nodes_without_a_body_are_named(rng: np.random.Generator) -> None:
    graph = tiny_decoder(rng)
    with pytest.raises(KeyError, match=r"layers\.9\.attention"):
        decompose(graph, ["layers.0.attention", "layers.9.attention"])
    with pytest.raises(KeyError, match=r"layers\.0\.q .*MatMul.* has no function body"):
        decompose(graph, ["layers.0.q"])


def _with_local_function() -> Graph:
    """y = Twice(Neg(x)) where Twice is a model-local function of an unregistered domain, called twice."""
    b = GraphBuilder("local")
    x = ir.Value(name="value")
    node = ir.Node("", "Add", [x, x], name="add", num_outputs=1)
    node.outputs[0].name = "sum"
    inner = ir.Graph([x], [node.outputs[0]], nodes=[node], opset_imports={"": 24}, name="Twice")
    function = ir.Function("com.example", "Twice", graph=inner, attributes=[])
    b.functions[function.identifier()] = function
    b.graph.opset_imports["com.example"] = 1
    value = b.op("Neg", b.input("x", "float32", ["n"]))
    for name in ("first", "second"):
        call = ir.Node("com.example", "Twice", [value], name=name, num_outputs=1)
        value = call.outputs[0]
        value.name, value.type = f"{name}.out", ir.TensorType(ir.DataType.FLOAT)
        b.graph.append(call)
    b.output(value, "y", ["n"])
    return b.finish(weights_hash="w")


def test_functions_of_unregistered_domains_are_inlined_and_registered_ones_kept(rng: np.random.Generator) -> None:
    graph = _with_local_function()
    flat = inline_functions(graph)
    flat.check()
    assert [n.op_type for n in flat.nodes()] == ["Neg", "Add", "Add"]
    np.testing.assert_array_equal(Executor(flat).run({"x": np.float32([1, 2])})["y"], np.float32([-4, -8]))
    decoder = tiny_decoder(rng)
    assert attention_nodes(inline_functions(decoder)) == attention_nodes(decoder)


def test_one_call_of_a_local_function_is_decomposed_and_the_other_kept(tmp_path: Path) -> None:
    part = decompose(_with_local_function(), ["second"])
    part.check()
    assert [n.op_type for n in part.nodes()] == ["Neg", "Twice", "Add"]
    np.testing.assert_array_equal(Executor(part).run({"x": np.float32([3])})["y"], np.float32([-12]))
    part.save(tmp_path / "part.onnx")
    assert Graph.open(tmp_path / "part.onnx").digest() == part.digest()


def test_types_are_told_for_graphs_that_were_opened(rng: np.random.Generator, tmp_path: Path) -> None:
    tiny_decoder(rng).save(tmp_path / "graph.onnx")
    opened = Graph.open(tmp_path / "graph.onnx")
    typed = infer_types(opened)
    assert all(v.dtype is not None for n in typed.nodes() for v in n.outputs)
    decompose(opened, ["norm"]).check()
