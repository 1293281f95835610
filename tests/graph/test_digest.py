"""The digest is equal for equal graphs, also after saving and opening, and differs after any relevant change.

Draws: digests are hashes: equal for equal graphs, and for others once in 2^160.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from transom.graph import Graph, GraphBuilder
from transom.graph.passes import decompose
from transom.graph.weights import dense
from transom.signature import METADATA_KEY
from transom.testing.models import VARIANTS, tiny_decoder


def made(seed: int, variant: str = "everything") -> Graph:
    return tiny_decoder(np.random.default_rng(seed), **VARIANTS[variant])


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_model_built_twice_has_one_digest(variant: str, seed: int) -> None:
    assert made(seed, variant).digest() == made(seed, variant).digest()


@pytest.mark.parametrize("variant", VARIANTS)
def test_digest_survives_a_file(variant: str, seed: int, tmp_path: Path) -> None:
    graph = made(seed, variant)
    before = graph.digest()
    graph.save(tmp_path / "graph.onnx")
    assert graph.digest() == before, "saving changed the graph"
    opened = Graph.open(tmp_path / "graph.onnx")
    assert opened.digest() == before
    opened.save(tmp_path / "again.onnx")
    assert Graph.open(tmp_path / "again.onnx").digest() == before
    flat = decompose(graph, ["layers.0.attention"])
    flat.save(tmp_path / "flat.onnx")
    assert Graph.open(tmp_path / "flat.onnx").digest() == flat.digest() != before


def test_variants_have_digests_of_their_own(seed: int) -> None:
    assert len({made(seed, v).digest() for v in VARIANTS}) == len(VARIANTS)


def _node(graph: Graph, name: str) -> ir.Node:
    return next(n for n in graph.nodes() if n.name == name)


def _epsilon(graph: Graph) -> None:
    _node(graph, "norm").attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-6)


def _window(graph: Graph) -> None:
    _node(graph, "layers.0.attention").attributes["sliding_window"] = ir.AttrInt64("sliding_window", 3)


def _permutation(graph: Graph) -> None:
    _node(graph, "layers.0.q.weight.transposed").attributes["perm"] = ir.AttrInt64s("perm", [0, 1])


def _rename_node(graph: Graph) -> None:
    _node(graph, "norm").name = "other"


def _rename_input(graph: Graph) -> None:
    graph.model.graph.inputs[0].name = "ids"


def _swap_inputs(graph: Graph) -> None:
    node = _node(graph, "layers.0.attended")
    a, b = node.inputs[0], node.inputs[1]
    node.replace_input_with(0, b)
    node.replace_input_with(1, a)


def _small_weight(graph: Graph) -> None:
    name = next(n for n in graph.model.graph.initializers if n.endswith("attention.sinks"))
    value = graph.model.graph.initializers[name]
    assert value.const_value is not None
    value.const_value = ir.Tensor(value.const_value.numpy() + 1, name=name)


def _weights(graph: Graph) -> None:
    graph.weights_hash = "another file"


def _body(graph: Graph) -> None:
    function = next(iter(graph.model.functions.values()))
    node = next(n for n in function if n.op_type == "Softmax")
    node.attributes["axis"] = ir.AttrInt64("axis", 0)


def _opset(graph: Graph) -> None:
    graph.model.graph.opset_imports[""] = 23


def _context(graph: Graph) -> None:
    text = graph.model.metadata_props[METADATA_KEY]
    graph.model.metadata_props[METADATA_KEY] = text.replace('"context": 160', '"context": 96')


def _output(graph: Graph) -> None:
    graph.model.graph.outputs.pop()


@pytest.mark.parametrize(
    "change",
    [
        _epsilon, _window, _permutation, _rename_node, _rename_input, _swap_inputs, _small_weight, _weights, _body,
        _opset, _context, _output,
    ],
)  # fmt: skip
def test_any_change_that_matters_changes_the_digest(change: Callable[[Graph], None], seed: int) -> None:
    graph = made(seed)
    before = graph.digest()
    change(graph)
    assert graph.digest() != before


def test_notes_and_documentation_do_not_count(seed: int) -> None:
    graph = made(seed)
    before = graph.digest()
    graph.notes = ("one tensor was re-rounded",)
    graph.model.doc_string = "words"
    next(graph.nodes()).doc_string = "more words"
    assert graph.digest() == before


def test_constants_of_one_content_and_two_shapes_or_types_differ() -> None:
    def graph(array: np.ndarray) -> Graph:  # type: ignore[type-arg]
        b = GraphBuilder("constants")
        x = b.input("x", "float32", [8])
        node = ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.tensor(array))], name="c", num_outputs=1)
        node.outputs[0].name = "c"
        b.graph.append(node)
        b.output(b.op("Identity", x), "y")
        return b.finish(weights_hash="w")

    base = np.arange(8, dtype=np.int32)
    digests = {graph(a).digest() for a in (base, base.reshape(2, 4), base.view(np.float32), base[::-1].copy())}
    assert len(digests) == 4


def test_changes_inside_a_branch_count() -> None:
    def graph(offset: int) -> Graph:
        b = GraphBuilder("branches")
        x = b.input("x", "float32", ["n"])
        condition = b.input("condition", "bool", [])
        branches = {}
        for name in ("then_branch", "else_branch"):
            one = ir.tensor(np.float32(offset if name == "then_branch" else 0), name=f"{name}.constant")
            value = ir.Value(name=one.name, type=ir.TensorType(one.dtype), shape=one.shape, const_value=one)
            node = ir.Node("", "Add", [x, value], name=f"{name}.add", num_outputs=1)
            node.outputs[0].name = f"{name}.out"
            branches[name] = ir.Graph([], [node.outputs[0]], nodes=[node], initializers=[value], name=name)
        y = b.op("If", condition, **branches)
        b.output(y, "y")
        return b.finish(weights_hash="w")

    assert graph(1).digest() == graph(1).digest() != graph(2).digest()


def test_weights_are_read_where_no_hash_names_them(rng: np.random.Generator) -> None:
    array = rng.standard_normal((64, 64)).astype(np.float32)

    def graph(array: np.ndarray, weights_hash: str) -> Graph:  # type: ignore[type-arg]
        b = GraphBuilder("one")
        b.output(b.linear(b.input("x", "float32", ["n", 64]), dense(array), "w"), "y")
        return b.finish(weights_hash=weights_hash)

    other = array.copy()
    other[-1, -1] += 1
    assert graph(array, "").digest() == graph(array.copy(), "").digest() != graph(other, "").digest()
    # with a hash, the file is trusted to match it, so that a large model need not be read
    assert graph(array, "file").digest() == graph(other, "file").digest()
