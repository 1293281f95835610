"""Which nodes the backend takes, and why not where it does not. A decoder is taken whole, or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from transom.contract import Claim
from transom.graph.reading import linear_weight, matrices, vocabulary_products
from transom.programs.drafting import Drafting, NoForm
from transom_cuda_triton import probing
from transom_cuda_triton.lowering import TritonKernels
from transom_cuda_triton.precision import Precision, resolve
from transom_cuda_triton.sharding import CannotShare, shard
from transom_cuda_triton.tiles import parts

if TYPE_CHECKING:
    from transom.contract import Device, Options
    from transom.graph import Graph


def precision_of(graph: Graph, device: Device, options: Options) -> Precision:
    """Raises OptionError for one that this device or checkpoint cannot have."""
    interpreted = probing.interpreting()
    return resolve(options, probing.architecture(device), matrices(graph), interpreted=interpreted)


def claims(graph: Graph, device: Device, options: Options) -> Iterator[Claim]:
    """One claim for each node, in order.

    Raises:
        OptionError: an option has a value that this device or checkpoint cannot have.
    """
    precision = precision_of(graph, device, options)
    if graph.decoder is None:
        for node in graph.nodes():
            yield Claim(str(node.name), False, "runs decoders only, and this graph has no cache")
        return
    wrong, reason, kernels = None, "", TritonKernels(precision)
    try:
        drafting = Drafting(graph, kernels)
        for layer in drafting.decoder.layers:
            reason = reason or _shape_refusal(layer.head_dim, layer.value_dim)
        if device.members and not reason:
            shard(drafting, len(device.members), 0)
    except CannotShare as e:
        reason = f"{len(device.members)} devices together: {e}"
    except NoForm as e:
        wrong, reason = e.node, e.reason
    heads = vocabulary_products(graph)
    for node in graph.nodes():
        refused = reason and (node is wrong if wrong is not None else node.op_type == "CachedAttention")
        if refused:
            yield Claim(str(node.name), False, reason)
            continue
        weight = linear_weight(node)
        rounded = weight is not None and kernels.by(weight, head=str(node.name) in heads)
        yield Claim(str(node.name), True, exact=not rounded)


def _shape_refusal(*sizes: int) -> str:
    """Why no tile serves these sizes of heads; empty if one does."""
    for size in sizes:
        try:
            parts(size)
        except ValueError as e:
            return str(e).rstrip(".")
    return ""
