"""Which nodes the backend claims, and the reasons for refusal. It claims a decoder as a whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from transom.authoring.refusing import NoAttention, claim, refusals
from transom.contract import Claim
from transom.graph.reading import linear_weight, matrices, vocabulary_products
from transom.programs.reading import GraphReader
from transom_cuda_triton import probing
from transom_cuda_triton.lowering import TritonKernels
from transom_cuda_triton.precision import DIVERGENCES, TritonPrecision, resolve
from transom_cuda_triton.sharding import CannotShare, shard
from transom_cuda_triton.tiles import parts

if TYPE_CHECKING:
    import onnx_ir as ir

    from transom.contract import Device, Options
    from transom.graph import Graph
    from transom.signature import LayerCache


def precision_of(graph: Graph, device: Device, options: Options) -> TritonPrecision:
    """Raises OptionError for a precision that this device or checkpoint does not support."""
    interpreted = probing.interpreting()
    return resolve(options, probing.architecture(device), matrices(graph), interpreted=interpreted)


def claims(graph: Graph, device: Device, options: Options) -> Iterator[Claim]:
    """One claim for each node, in order.

    Raises:
        OptionError: an option has a value that this device or checkpoint does not support.
    """
    precision = precision_of(graph, device, options)
    kernels = TritonKernels(precision)
    refused = refusals(graph, kernels, lambda: _read(graph, kernels, len(device.members)), _untiled)
    heads = vocabulary_products(graph) if graph.decoder is not None else ()
    for node in graph.nodes():
        if (answer := claim(node, refused)) is not None:
            yield answer
            continue
        weight = linear_weight(node)
        by = "" if weight is None else kernels.by(weight, head=str(node.name) in heads)
        yield Claim(str(node.name), True, exact=not by, divergence=DIVERGENCES.get(by))


def _untiled(node: ir.Node, layer: LayerCache) -> str:
    """Why no tile fits the heads of a layer; empty if one does."""
    try:
        parts(layer.head_dim)
        parts(layer.value_dim)
    except ValueError as e:
        return str(e).rstrip(".")
    return ""


def _read(graph: Graph, kernels: TritonKernels, ranks: int) -> None:
    """Raises UnsupportedNode or NoAttention if the kernels cannot run the decoder, or not on `ranks` cards."""
    reader = GraphReader(graph, kernels)
    if not ranks:
        return
    try:
        shard(reader, ranks, 0)
    except CannotShare as e:
        raise NoAttention(f"{ranks} devices together: {e}") from e
