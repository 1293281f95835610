"""Which nodes the backend claims, and why it refuses the others. A decoder is claimed whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from transom.authoring.refusing import refusals
from transom.contract import Claim
from transom.graph.reading import linear_weight, weight_of
from transom.programs.reading import GraphReader
from transom_mobile_export.onnx.lowering import GenAiKernels, require_heads
from transom_mobile_export.onnx.packing import block_of
from transom_mobile_export.onnx.precision import OnnxPrecision, resolve
from transom_mobile_export.onnx.quantizing import form_of

if TYPE_CHECKING:
    import onnx_ir as ir

    from transom.contract import Options
    from transom.graph import Graph


def claims(graph: Graph, options: Options) -> Iterator[Claim]:
    """One claim for each node, in order.

    Raises:
        OptionError: the precision is unknown.
    """
    precision = resolve(options)
    refused = refusals(graph, lambda: require_heads(GraphReader(graph, GenAiKernels())))
    for node in graph.nodes():
        name = str(node.name)
        if name in refused:
            yield Claim(name, False, refused[name])
        else:
            yield Claim(name, True, exact=_exact(node, precision))


def _exact(node: ir.Node, precision: OnnxPrecision) -> bool:
    """Whether the node is computed exactly as in the graph. Products with integer matrices quantize their inputs."""
    weight = linear_weight(node)
    if weight is not None:
        return precision.exact or not block_of(form_of(weight, precision, vocabulary=False))
    table = weight_of(node.inputs[0]) if node.op_type == "Gather" else None
    return table is None or len(table.shape) != 2 or form_of(table, precision, vocabulary=True) is table
