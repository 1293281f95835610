"""Which nodes the backend claims, and why it refuses the others. A decoder is claimed whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from transom.authoring.refusing import refusals
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
    from transom.contract import Device, Options
    from transom.graph import Graph


def precision_of(graph: Graph, device: Device, options: Options) -> RtxPrecision:
    """The resolved precision. Raises OptionError if this device or checkpoint does not support it."""
    return resolve(options, probing.architecture(device), matrices(graph), emulated=probing.emulating())


def claims(graph: Graph, device: Device, options: Options) -> Iterator[Claim]:
    """One claim for each node, in order.

    Raises:
        OptionError: this device or checkpoint does not support the value of an option.
    """
    precision = precision_of(graph, device, options)
    refused = refusals(graph, lambda: GraphReader(graph, RtxKernels()))
    for node in graph.nodes():
        if str(node.name) in refused:
            yield Claim(str(node.name), False, refused[str(node.name)])
            continue
        if is_attention(node):
            assert graph.decoder is not None  # otherwise it was refused
            policy = Sparsity.parse(node.attributes.get_string("sparsity", "dense"))
            layer = graph.decoder.layers[node.attributes.get_int("layer", 0)]
            if reason := sparse.unaligned(policy, layer.head_dim):
                yield Claim(str(node.name), False, reason)
            else:
                yield Claim(str(node.name), True, exact=policy.dense and not precision.attention)
            continue
        weight = linear_weight(node)
        if isinstance(weight, Blocked):
            inexact = precision.number != "float32" and not forms.kept(weight)
        else:
            inexact = weight is not None and bool(precision.quantized)
        yield Claim(str(node.name), True, exact=not inexact)
