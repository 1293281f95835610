"""Imports any `onnx_ir.Model` as a neutral graph, or refuses it and names the node.

Steps: constants and the weights of subgraphs move to the main graph; local functions are inlined; operators are
converted to opset 24; ONNX Runtime's own operators are expanded. Weights are never read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import onnx_ir as ir
from onnx_ir.passes.common import (
    IdentityEliminationPass,
    InlinePass,
    LiftConstantsToInitializersPass,
    LiftSubgraphInitializersToMainGraphPass,
    RemoveInitializersFromInputsPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
    TopologicalSortPass,
)

from transom.errors import SourceError, UnsupportedError, message_lines
from transom.graph.builder import IR_VERSION
from transom.graph.contrib import DOMAIN as CONTRIB
from transom.graph.contrib import expand_contrib, has_expansion, is_contrib
from transom.graph.editing import all_nodes, all_values
from transom.graph.graph import Graph
from transom.graph.shapes import infer_shapes, without_negative_dims
from transom.ops import find
from transom.ops.functions import OPSET

MOST_NODES = 200_000
"""Nodes of a graph whose functions are written out. Exported models have up to some ten thousand."""
MOST_CALLS = 100
"""Functions that call each other in a row."""
MOST_BYTES = 1 << 36
"""Bytes of one computed tensor."""
MOST_AXIS = (1 << 31) - 1
"""The largest axis that onnx's inference of shapes tells from others."""
ML_OPSET = 5
"""The version of `ai.onnx.ml` in a neutral graph."""


def import_model(model: ir.Model, *, name: str, weights_hash: str, notes: Sequence[str] = ()) -> Graph:
    """Convert the model to a neutral graph. The model is changed in place.

    Raises:
        UnsupportedError: a node, which the message names, has an unknown operator or one without an equivalent in
            opset 24.
        SourceError: the model is not valid ONNX.
    """
    noted = list(notes)
    graph = model.graph
    for value in all_values(graph):
        without_negative_dims(value)
    _check_calls(model)
    graph.name = graph.name or name
    for old in ("ai.onnx",):
        if old in graph.opset_imports:
            graph.opset_imports[""] = graph.opset_imports.pop(old)
    RemoveInitializersFromInputsPass()(model)
    LiftSubgraphInitializersToMainGraphPass()(model)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    if empty := [str(n) for n, v in graph.initializers.items() if v.const_value is None]:
        raise SourceError(f"{name} has no data for its weight {empty[0]}", "Export the model again, with its weights")
    _name_nodes(model)
    version = graph.opset_imports.get("", OPSET)
    _align_function_opsets(model, version)
    InlinePass(criteria=lambda f: find(f.domain, f.name) is None)(model)
    _remove_functions(model)
    _name_nodes(model)
    _check_operators(model, version)
    for node in all_nodes(model.graph):
        if is_contrib(node):  # onnx's converter looks up a schema for every node without a domain
            node.domain = CONTRIB
            model.graph.opset_imports.setdefault(CONTRIB, 1)
    model = _to_opset(model, version, noted)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    expand_contrib(model)
    _bypass_single_concats(model)
    IdentityEliminationPass()(model)
    RemoveUnusedNodesPass()(model)
    TopologicalSortPass()(model)
    RemoveUnusedOpsetsPass()(model)
    _name_nodes(model)
    model.graph.opset_imports[""] = OPSET
    model.ir_version = IR_VERSION
    model.producer_name = "transom"
    for node in all_nodes(model.graph):
        if node.op_type == "Loop" and len(node.inputs) < 2:  # a pass dropped the empty condition, which ONNX requires
            node.resize_inputs(2)
    result = Graph(model, weights_hash=weights_hash, notes=noted)
    _check_axes(result)
    infer_shapes(result)
    _check_sizes(result)
    return result


def _check_calls(model: ir.Model) -> None:
    """Check that the calls of functions end, fit the functions, and make no graph too large to run."""
    sizes: dict[ir.OperatorIdentifier, int] = {}

    def count(nodes: Iterable[ir.Node], callers: tuple[ir.OperatorIdentifier, ...]) -> int:
        """Nodes after inlining; more than `MOST_NODES` where they are too many."""
        total = 0
        for node in nodes:
            function = model.functions.get(node.op_identifier())
            if function is None:
                total += 1
                continue
            name, identifier = f"{function.domain}::{function.name}", function.identifier()
            if identifier in callers:
                raise SourceError(f"the function {name} calls itself", "Export the model again")
            if len(callers) == MOST_CALLS:
                raise UnsupportedError(
                    f"the function {name} is called by {MOST_CALLS} functions inside of each other",
                    "Export the model again, with fewer calls of functions inside of functions",
                )
            if len(node.inputs) > len(function.inputs) or len(node.outputs) > len(function.outputs):
                raise SourceError(
                    f"the node {node.name} calls {name} with more inputs or outputs than it has",
                    "Export the model again",
                )
            if identifier not in sizes:
                sizes[identifier] = count(all_nodes(function.graph), (*callers, identifier))
            total += sizes[identifier]
        return total

    if count(all_nodes(model.graph), ()) > MOST_NODES:
        raise UnsupportedError(
            f"the model has more than {MOST_NODES} nodes where its functions are written out",
            "Export the model again, with fewer calls of functions inside of functions",
        )


def _check_axes(graph: Graph) -> None:
    """Check that each axis is one that an int32 holds: onnx's inference would cut it to another, which may exist."""
    for node in all_nodes(graph.model.graph):
        axis = node.attributes.get("axis")
        if axis is not None and axis.type == ir.AttributeType.INT and abs(int(axis.value)) > MOST_AXIS:
            raise SourceError(
                f"the node {node.name} ({node.op_type}) goes along the axis {axis.value}, which no tensor has",
                "Export the model again, or get the file again",
            )


def _check_sizes(graph: Graph) -> None:
    """Check that no node has an output too large for any machine, such as `Range(0, 10**12)`."""
    for node in graph.nodes():
        for value in node.outputs:
            dims = [] if value.shape is None else list(value.shape)
            if value.dtype in (None, ir.DataType.STRING) or not all(isinstance(d, int) for d in dims):
                continue
            size = math.prod(int(d) for d in dims if isinstance(d, int)) * value.dtype.bitwidth // 8
            if size > MOST_BYTES:
                raise UnsupportedError(
                    f"the node {node.name} ({node.op_type}) makes a tensor of {size / 1e9:.0f} GB",
                    "Export the model with smaller inputs, or get the file from a source you trust",
                )


def _remove_functions(model: ir.Model) -> None:
    """Remove functions that no node calls."""
    called = {n.op_identifier() for n in all_nodes(model.graph)}
    for function in model.functions.values():
        called |= {n.op_identifier() for n in all_nodes(function.graph)}
    for identifier in [i for i in model.functions if i not in called]:
        del model.functions[identifier]


def _bypass_single_concats(model: ir.Model) -> None:
    """Bypass each Concat of a single input, which torch writes for an empty cache: it is a copy."""
    for node in all_nodes(model.graph):
        if (
            node.op_type == "Concat"
            and not node.domain
            and len(node.inputs) == 1
            and not node.outputs[0].is_graph_output()
        ):
            source = node.inputs[0]
            if source is not None:
                node.outputs[0].replace_all_uses_with(source)


def _name_nodes(model: ir.Model) -> None:
    """Give every node a unique name: claims, errors and edits refer to it."""
    taken: set[str] = set()
    for node in all_nodes(model.graph):
        base = node.name or next((str(v.name) for v in node.outputs if v.name), node.op_type)
        name, number = base, 0
        while name in taken:
            number += 1
            name = f"{base}_{number}"
        taken.add(name)
        node.name = name
    used = {str(v.name) for v in all_values(model.graph) if v.name}
    for node in all_nodes(model.graph):
        for i, value in enumerate(node.outputs):
            if value.name == "" and not value.uses():
                continue  # an unused optional output
            if not value.name:
                name = f"{node.name}.{i}"
                while name in used:
                    name += "_"
                value.name = name
                used.add(name)


def _align_function_opsets(model: ir.Model, version: int) -> None:
    """Set each function's opset to the model's; refuse a function with an operator that differs between the two."""
    for function in model.functions.values():
        own = function.opset_imports.get("", version)
        if own == version:
            continue
        for node in function:
            if not node.domain and _since(node.op_type, own) != _since(node.op_type, version):
                raise UnsupportedError(
                    f"the function {function.domain}::{function.name} uses {node.op_type} of opset {own}, "
                    f"but the model is opset {version}",
                    "Export the model again with one opset, 23 or 24",
                )
        function.opset_imports[""] = version


def _since(op_type: str, version: int, domain: str = "") -> int | None:
    import onnx

    if not 0 < version < 1 << 31:
        raise SourceError(f"the model states the impossible opset {version}", "Export the model again")
    try:
        return int(onnx.defs.get_schema(op_type, version, domain).since_version)
    except onnx.defs.SchemaError:
        return None


def _check_operators(model: ir.Model, version: int) -> None:
    import onnx

    for node in all_nodes(model.graph):
        domain = "" if node.domain == "ai.onnx" else node.domain
        if is_contrib(node) and has_expansion(node.op_type):
            continue
        if domain == "":
            if _since(node.op_type, version) is not None:
                continue
            if version > onnx.defs.onnx_opset_version():
                raise UnsupportedError(
                    f"the node {node.name} uses the operator {node.op_type} of opset {version}; the installed onnx "
                    f"package has opset {onnx.defs.onnx_opset_version()}",
                    "pip install --upgrade onnx",
                )
        elif domain == "ai.onnx.ml":
            if _since(node.op_type, ML_OPSET, domain) is not None:
                continue
        elif find(domain, node.op_type) is not None:
            continue
        raise UnsupportedError(
            f"the node {node.name} uses the operator {domain or 'ai.onnx'}::{node.op_type}, which Transom does not "
            "know and for which the model contains no function",
            "Register it through the hook transom_ops, give the model a function body for it, or export the model "
            "without it",
        )


def _to_opset(model: ir.Model, version: int, notes: list[str]) -> ir.Model:
    """Relabel the model as opset 24 if all its operators mean the same there; otherwise convert it."""
    if version == OPSET:
        return model
    changed = [
        n
        for n in all_nodes(model.graph)
        if n.domain in ("", "ai.onnx") and not is_contrib(n) and _since(n.op_type, version) != _since(n.op_type, OPSET)
    ]
    if not changed:
        model.graph.opset_imports[""] = OPSET
        return model
    if version > OPSET:
        raise UnsupportedError(
            f"the node {changed[0].name} uses {changed[0].op_type} as opset {version} defines it; "
            f"Transom's graphs are opset {OPSET}",
            f"Export the model with opset {OPSET} or lower",
        )
    if batched := [n for n in changed if n.op_type == "Scan" and version < 9]:
        # onnx's converter leaves it as it is, with another meaning
        raise UnsupportedError(
            f"the node {batched[0].name} is a Scan of opset {version}, which goes through a batch",
            "Export the model with opset 9 or later",
        )
    notes.append(f"converted from opset {version} to {OPSET}")
    return _convert(model, version)


def _convert(model: ir.Model, version: int) -> ir.Model:
    import onnx
    from onnx import version_converter

    tensors = {name: v.const_value for name, v in model.graph.initializers.items()}
    model.ir_version = max(model.ir_version, 4)
    structure = Graph(model, weights_hash="").structure()
    try:
        converted = version_converter.convert_version(structure, OPSET)
    except (RuntimeError, onnx.version_converter.ConvertError, onnx.checker.ValidationError) as e:
        raise UnsupportedError(
            f"the model is opset {version} and cannot be converted to {OPSET}: {message_lines(e)[-1]}",
            "Export the model again with opset 18 or later",
        ) from e
    try:
        result = ir.from_proto(converted)
    except (ValueError, TypeError, KeyError) as e:
        raise SourceError(f"the model is not valid ONNX of opset {version}: {e}", "Export the model again") from e
    for value in list(result.graph.inputs):
        tensor = tensors.get(str(value.name))
        if tensor is not None and str(value.name) not in result.graph.initializers:
            result.graph.inputs.remove(value)
            value.const_value = tensor
            result.graph.register_initializer(value)
    result.metadata_props.update(model.metadata_props)
    _name_nodes(result)
    return result
