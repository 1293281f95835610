"""Which nodes the backend claims, and why it refuses the others. A decoder is claimed whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from transom.authoring.refusing import claim, refusals
from transom.contract import Claim
from transom.graph.reading import linear_weight, matrices
from transom.graph.sparse import is_attention
from transom.graph.weights import Blocked
from transom.programs.reading import GraphReader
from transom.sparsity import Sparsity
from transom_tensorrt import forms, probing, sparse
from transom_tensorrt.lowering import RtxKernels
from transom_tensorrt.precision import RtxPrecision, resolve

if TYPE_CHECKING:
    import onnx_ir as ir

    from transom.contract import Device, Options
    from transom.graph import Graph
    from transom.signature import LayerCache


def precision_of(graph: Graph, device: Device, options: Options) -> RtxPrecision:
    """The resolved precision. Raises OptionError if this device or checkpoint does not support it."""
    return resolve(options, probing.architecture(device), matrices(graph), emulated=probing.emulating())


def claims(graph: Graph, device: Device, options: Options) -> Iterator[Claim]:
    """One claim for each node, in order.

    Raises:
        OptionError: this device or checkpoint does not support the value of an option.
    """
    precision = precision_of(graph, device, options)
    kernels = RtxKernels()
    refused = refusals(graph, kernels, lambda: GraphReader(graph, kernels), _unaligned)
    for node in graph.nodes():
        if (answer := claim(node, refused)) is not None:
            yield answer
            continue
        if is_attention(node):
            yield Claim(str(node.name), True, exact=_policy(node).dense and not precision.attention)
            continue
        weight = linear_weight(node)
        if isinstance(weight, Blocked):
            inexact = precision.number != "float32" and not forms.kept(weight)
        else:
            inexact = weight is not None and bool(precision.quantized)
        # Plain matrices rounded to int4 lose the most: 0.32 nats on SmolLM2-135M.
        rounded = inexact and precision.quantized == "int4" and not isinstance(weight, Blocked)
        yield Claim(str(node.name), True, exact=not inexact, divergence=0.5 if rounded else None)


def _policy(node: ir.Node) -> Sparsity:
    return Sparsity.parse(node.attributes.get_string("sparsity", "dense"))


def _unaligned(node: ir.Node, layer: LayerCache) -> str:
    return sparse.unaligned(_policy(node), layer.head_dim)
