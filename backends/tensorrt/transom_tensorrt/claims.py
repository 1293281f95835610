"""Which nodes the backend takes, and why not where it does not. A decoder is taken whole, or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from transom.contract import Claim
from transom.graph.reading import linear_weight
from transom.graph.weights import Blocked, Weight
from transom.programs.drafting import Drafting, NoForm
from transom_tensorrt import forms, probing
from transom_tensorrt.lowering import RtxKernels
from transom_tensorrt.precision import Precision, resolve

if TYPE_CHECKING:
    from transom.contract import Device, Options
    from transom.graph import Graph


def matrices(graph: Graph) -> list[Weight]:
    """The weights of the graph's matrix products."""
    return [w for n in graph.nodes() if (w := linear_weight(n)) is not None]


def precision_of(graph: Graph, device: Device, options: Options) -> Precision:
    """Raises OptionError for one that this device or checkpoint cannot have."""
    return resolve(options, probing.architecture(device), matrices(graph), emulated=probing.emulating())


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
    wrong, reason = None, ""
    try:
        Drafting(graph, RtxKernels())
    except NoForm as e:
        wrong, reason = e.node, e.reason
    for node in graph.nodes():
        if node is wrong:
            yield Claim(str(node.name), False, reason)
            continue
        weight = linear_weight(node)
        anew = isinstance(weight, Blocked) and not forms.kept(weight)
        rounded = weight is not None and (anew or (bool(precision.rounded) and not isinstance(weight, Blocked)))
        sparse = node.op_type == "CachedAttention" and node.attributes.get_string("sparsity", "dense") != "dense"
        yield Claim(str(node.name), True, exact=not rounded and not sparse)
