"""Rewrites the neutral graph in small named passes. Each pass takes a graph and returns a new one."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from transom.graph.bodies import body_of
from transom.graph.graph import Graph

_CALL = "transom.call"


def decompose(graph: Graph, nodes: Collection[str]) -> Graph:
    """Replace the named nodes by their function bodies in standard operators.

    The new nodes are named after the node they replace, `"layers.0.attention.MatMul_1"`. `transom.graph.bodies` finds
    the bodies.

    Raises:
        KeyError: a name is not a node of the graph, or the node has no function body.
    """
    wanted = set(nodes)
    if any(n.name in wanted and not n.domain and _untyped(n) for n in graph.nodes()):
        graph = infer_types(graph)  # ONNX's own bodies depend on the types of their inputs
    model = graph.model.clone()
    found = {str(n.name): n for n in model.graph if n.name in wanted}
    if missing := wanted - set(found):
        raise KeyError(f"no node named {', '.join(sorted(missing))}")
    marked: set[ir.OperatorIdentifier] = set()
    for number, node in enumerate(found.values()):
        body = body_of(model, node)
        if body is None:
            raise KeyError(f"{node.name} ({node.domain or 'ai.onnx'}::{node.op_type}) has no function body")
        if node.op_identifier() not in model.functions:  # give the node its own copy of the body
            own = body.clone()
            own.overload = node.overload = f"{node.overload}_call{number}"
            model.functions[own.identifier()] = own
        marked.add(node.op_identifier())
    calls = list(found.values())
    _keep_other_calls(model, marked, calls)
    for node in calls:
        node.metadata_props[_CALL] = str(node.name)
    InlinePass(criteria=lambda f: f.identifier() in marked)(model)
    _name_for_call(model)
    return _rebuilt(graph, model)


def _keep_other_calls(model: ir.Model, marked: Collection[ir.OperatorIdentifier], calls: Collection[ir.Node]) -> None:
    """A function is inlined at all calls or at none, so the remaining calls get a copy under another overload."""
    inlined = {id(node) for node in calls}
    for identifier in marked:
        staying = [n for n in _every_node(model) if n.op_identifier() == identifier and id(n) not in inlined]
        if staying:
            domain, name, overload = identifier
            copy = model.functions[identifier].clone()
            copy.overload = f"{overload}_kept"
            model.functions[(domain, name, copy.overload)] = copy
            for node in staying:
                node.overload = copy.overload


def _every_node(model: ir.Model) -> Iterator[ir.Node]:
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def _name_for_call(model: ir.Model) -> None:
    taken = {str(n.name) for n in model.graph}
    for node in model.graph:
        call = node.metadata_props.pop(_CALL, None)
        if call is None:
            continue
        base = name = f"{call}.{node.op_type}"
        number = 1
        while name in taken:
            name, number = f"{base}_{number}", number + 1
        taken.add(name)
        node.name = name


def _untyped(node: ir.Node) -> bool:
    return any(v is not None and v.dtype is None for v in node.inputs)


def infer_types(graph: Graph) -> Graph:
    """Set the element type and shape of every value of the main graph that ONNX's shape inference can determine."""
    import onnx

    model = graph.model.clone()
    structure = graph.structure()
    inferred: dict[str, onnx.TypeProto] = {}
    for follow_data in (True, False):  # data propagation finds more shapes, but fails on broadcast index arithmetic
        proto = onnx.shape_inference.infer_shapes(structure, data_prop=follow_data)
        inferred = {info.name: info.type for info in (*proto.graph.value_info, *proto.graph.output)} | inferred
    for node in model.graph:
        for value in node.outputs:
            type_proto = inferred.get(str(value.name))
            if type_proto is None or not type_proto.HasField("tensor_type"):
                continue
            if value.type is None:
                value.type = ir.TensorType(ir.DataType(type_proto.tensor_type.elem_type))
            if value.shape is None and type_proto.tensor_type.HasField("shape"):
                dims = type_proto.tensor_type.shape.dim
                value.shape = ir.Shape([d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in dims])
    return _rebuilt(graph, model)


def inline_functions(graph: Graph) -> Graph:
    """Replace every call of a model-local function by its body, unless it is a registered operator."""
    from transom.ops import find

    model = graph.model.clone()
    InlinePass(criteria=lambda f: find(f.domain, f.name) is None)(model)
    return _rebuilt(graph, model)


def _rebuilt(graph: Graph, model: ir.Model) -> Graph:
    return Graph(model, weights_hash=graph.weights_hash, notes=graph.notes)
