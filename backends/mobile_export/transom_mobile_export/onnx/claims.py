"""Which nodes the backend claims, and why it refuses the others. A decoder is claimed whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from transom.authoring.refusing import claim, refusals
from transom.contract import Claim
from transom.graph.reading import linear_weight, weight_of
from transom.graph.weights import Dense
from transom.programs.reading import GraphReader
from transom_mobile_export.onnx.lowering import GenAiKernels, wrong_heads
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
    kernels = GenAiKernels()
    refused = refusals(graph, kernels, lambda: GraphReader(graph, kernels), lambda node, layer: wrong_heads(layer))
    for node in graph.nodes():
        if (answer := claim(node, refused)) is not None:
            yield answer
        else:
            exact = _exact(node, precision)
            yield Claim(str(node.name), True, exact=exact, divergence=None if exact else _divergence(node, precision))


DIVERGENCE, DIVERGENCE_INT4 = 0.1, 0.5
"""Nats. SmolLM2-135M measures 0.004 with int8 inputs of products and int8 or stored weights, and 0.32 with plain
matrices that are rounded to int4."""


def _divergence(node: ir.Node, precision: OnnxPrecision) -> float:
    """What the whole model may diverge by because of approximations such as this node's, nats."""
    rounded = isinstance(linear_weight(node), Dense) and precision.quantized == "int4"
    return DIVERGENCE_INT4 if rounded else DIVERGENCE


def _exact(node: ir.Node, precision: OnnxPrecision) -> bool:
    """Whether the node is computed exactly as in the graph. Products with integer matrices quantize their inputs."""
    weight = linear_weight(node)
    if weight is not None:
        return precision.exact or not block_of(form_of(weight, precision, vocabulary=False))
    table = weight_of(node.inputs[0]) if node.op_type == "Gather" else None
    return table is None or len(table.shape) != 2 or form_of(table, precision, vocabulary=True) is table
