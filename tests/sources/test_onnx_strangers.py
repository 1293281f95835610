"""ONNX files that a stranger could write: each is refused in one sentence, before anything is computed.

Draws: nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_models import save, value

from transom.errors import TransomError
from transom.sources.onnx import OnnxSource

node = helper.make_node
INT, BOOL = TensorProto.INT64, TensorProto.BOOL


def model(nodes: list[Any], *, inputs: Any = None, outputs: Any = None, weights: Any = (), functions: Any = ()) -> Any:
    inputs = [value("x", shape=[3])] if inputs is None else inputs
    graph = helper.make_graph(nodes, "g", inputs, [value("y")] if outputs is None else outputs, list(weights))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("f", 1)]
    return helper.make_model(graph, opset_imports=opsets, functions=list(functions), ir_version=10)


def function(name: str, *nodes: Any) -> Any:
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("f", 1)]
    return helper.make_function("f", name, ["a"], ["b"], list(nodes), opsets)


def call(name: str, start: str, end: str) -> Any:
    return node(name, [start], [end], domain="f")


def calling_twice(depth: int) -> Any:
    """Functions that call the one before them twice: 2 ** depth nodes."""
    functions = [function("F0", node("Neg", ["a"], ["b"]))]
    for k in range(1, depth):
        functions.append(function(f"F{k}", call(f"F{k - 1}", "a", "t"), call(f"F{k - 1}", "t", "b")))
    return model([call(f"F{depth - 1}", "x", "y")], functions=functions)


def calling_in_a_row(depth: int) -> Any:
    functions = [function("F0", node("Neg", ["a"], ["b"]))]
    functions += [function(f"F{k}", call(f"F{k - 1}", "a", "b")) for k in range(1, depth)]
    return model([call(f"F{depth - 1}", "x", "y")], functions=functions)


def calling(*functions: Any) -> Any:
    return model([call("F", "x", "y")], functions=functions)


def constant(name: str, array: Any) -> Any:
    return node("Constant", [], [name], value=numpy_helper.from_array(np.asarray(array), name))


def summing(op_type: str, *inputs: str, **constants: Any) -> Any:
    """The sum of a large tensor that a few bytes describe."""
    nodes = [constant(name, array) for name, array in constants.items()]
    nodes += [node(op_type, list(inputs), ["large"]), node("ReduceSum", ["large"], ["y"], keepdims=0)]
    return model(nodes, outputs=[value("y", INT if op_type == "Range" else TensorProto.FLOAT)])


def adding(tensor: Any) -> Any:
    return model([node("Add", ["x", "w"], ["y"])], weights=[tensor])


def tensor(**fields: Any) -> Any:
    return TensorProto(**{"name": "w", "data_type": 1, "dims": [3], **fields})


def looping(change: Callable[[Any], None]) -> Any:
    """A Loop whose node is changed."""
    nodes = [node("Identity", ["c"], ["c2"]), node("Add", ["s", "s"], ["o"])]
    inputs = [value("i", INT), value("c", BOOL), value("s")]
    body = helper.make_graph(nodes, "body", inputs, [value("c2", BOOL), value("o")])
    count = numpy_helper.from_array(np.int64(3), "m")
    made = model([node("Loop", ["m", "", "x"], ["y"], body=body)], weights=[count])
    change(made.graph.node[0])
    return made


def without_types(loop: Any) -> None:
    graph = loop.attribute[0].g
    for v in (*graph.input, *graph.output):
        v.ClearField("type")


def choosing(*, reads: str = "x", gives: str = "o") -> Any:
    then = helper.make_graph([node("Neg", [reads], ["o"])], "then", [], [value(gives)])
    other = helper.make_graph([node("Neg", ["x"], ["o"])], "other", [], [value("o")])
    chosen = node("If", ["c"], ["y"], then_branch=then, else_branch=other)
    return model([chosen], inputs=[value("x", shape=[3]), value("c", BOOL, [])])


STRANGE: dict[str, Callable[[], Any]] = {
    "functions called 2 ** 23 times": lambda: calling_twice(23),
    "functions called 400 deep": lambda: calling_in_a_row(400),
    "a function that calls itself": lambda: calling(function("F", call("F", "a", "b"))),
    "functions in a circle": lambda: calling(function("F", call("G", "a", "b")), function("G", call("F", "a", "b"))),
    "a function defined twice": lambda: calling(*[function("F", node("Neg", ["a"], ["b"]))] * 2),
    "a function without its output": lambda: calling(function("F", node("Neg", ["a"], ["c"]))),
    "a function that reads nothing known": lambda: calling(function("F", node("Neg", ["q"], ["b"]))),
    "a call without its input": lambda: model(
        [node("F", [], ["y"], domain="f")], functions=[function("F", node("Neg", ["a"], ["b"]))]
    ),
    "a call with too many inputs": lambda: model(
        [node("F", ["x", "x"], ["y"], domain="f")], functions=[function("F", node("Neg", ["a"], ["b"]))]
    ),
    "Range to 10 ** 12": lambda: summing("Range", "a", "b", "c", a=np.int64(0), b=np.int64(10**12), c=np.int64(1)),
    "ConstantOfShape of 4 TB": lambda: summing("ConstantOfShape", "s", s=np.int64([10**6, 10**6])),
    "Expand to 12 TB": lambda: summing("Expand", "x", "s", s=np.int64([10**6, 10**6, 3])),
    "Tile to 12 TB": lambda: summing("Tile", "x", "s", s=np.int64([10**12])),
    "Pad to 4 TB": lambda: summing("Pad", "x", "s", s=np.int64([0, 10**12])),
    "an output listed twice": lambda: model([node("Neg", ["x"], ["y"])], outputs=[value("y"), value("y")]),
    "a value made by two nodes": lambda: model([node("Neg", ["x"], ["y"]), node("Abs", ["x"], ["y"])]),
    "a value made twice by a node": lambda: model(
        [node("TopK", ["x", "k"], ["y", "y"])], weights=[numpy_helper.from_array(np.int64([1]), "k")]
    ),
    "a node that makes an input": lambda: model([node("Neg", ["x"], ["x"])], outputs=[value("x")]),
    "an input listed twice": lambda: model([node("Neg", ["x"], ["y"])], inputs=[value("x", shape=[3])] * 2),
    "an output without a name": lambda: model([node("Neg", ["x"], ["y"])], outputs=[value("y"), value("")]),
    "a loop without types": lambda: looping(without_types),
    "a loop whose body has no outputs": lambda: looping(lambda n: n.attribute[0].g.ClearField("output")),
    "a loop whose body is empty": lambda: looping(lambda n: n.attribute[0].g.Clear()),
    "a loop without a body": lambda: looping(lambda n: n.ClearField("attribute")),
    "a branch that reads nothing known": lambda: choosing(reads="nothing"),
    "a branch that lacks its output": lambda: choosing(gives="nothing"),
    "a tensor without data": lambda: adding(tensor()),
    "a tensor with too few numbers": lambda: adding(tensor(float_data=[1.0])),
    "a tensor with numbers of another type": lambda: adding(tensor(int32_data=[1, 2, 3])),
    "a tensor of 2 ** 80 numbers": lambda: adding(tensor(dims=[2**40, 2**40])),
    "a constant without data": lambda: model(
        [node("Constant", [], ["w"], value=tensor()), node("Add", ["x", "w"], ["y"])]
    ),
    "a constant without a value": lambda: model([node("Constant", [], ["w"]), node("Add", ["x", "w"], ["y"])]),
    "a Concat along the axis 2 ** 62": lambda: model([node("Concat", ["x", "x"], ["y"], axis=2**62)]),
    "a Softmax along the axis -(2 ** 32)": lambda: model([node("Softmax", ["x"], ["y"], axis=-(2**32))]),
    "an attribute of another type": lambda: model([node("Softmax", ["x"], ["y"], axis="last")]),
    "a node without its input": lambda: model([node("Add", ["x"], ["y"])]),
    "a node with too many inputs": lambda: model([node("Neg", ["x", "x"], ["y"])]),
    "a node with too many outputs": lambda: model([node("Neg", ["x"], ["y", "z"])]),
}


@pytest.mark.parametrize("what", STRANGE)
def test_a_strange_file_is_refused_in_one_sentence(what: str, tmp_path: Path) -> None:
    path = tmp_path / "strange.onnx"
    path.write_bytes(STRANGE[what]().SerializeToString())
    with pytest.raises(TransomError) as refused:
        OnnxSource().open(path)
    assert refused.value.cause
    assert "\n" not in refused.value.cause


@pytest.mark.parametrize("opset", [-3, 0, 2**31, 2**40])
def test_an_impossible_opset_is_refused_in_one_sentence(opset: int, tmp_path: Path) -> None:
    made = model([node("Neg", ["x"], ["y"])])
    made.opset_import[0].version = opset
    with pytest.raises(TransomError):
        OnnxSource().open(save(made, tmp_path / "strange.onnx"))


def test_functions_that_call_each_other_within_reason_run(tmp_path: Path) -> None:
    opened = OnnxSource().open(save(calling_twice(8), tmp_path / "model.onnx"))
    assert sum(1 for n in opened.graph.nodes() if n.op_type == "Neg") == 2**7


def test_dimensions_below_zero_are_unknown_ones(tmp_path: Path) -> None:
    nodes = [node("Relu", ["x"], ["t"]), node("Neg", ["t"], ["y"])]
    made = model(nodes, inputs=[value("x", shape=[-1, 3])], outputs=[value("y", shape=[-1, 3])])
    made.graph.value_info.append(value("t", shape=[-1, 3]))
    graph = OnnxSource().open(save(made, tmp_path / "model.onnx")).graph
    values = [*graph.model.graph.inputs, *(v for n in graph.nodes() for v in n.outputs)]
    assert len(values) == 3
    for v in values:
        assert v.shape is not None
        assert not isinstance(v.shape[0], int)
        assert v.shape[1] == 3
