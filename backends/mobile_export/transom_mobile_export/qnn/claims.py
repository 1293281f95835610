"""Which nodes the backend claims, and why it refuses the others. A decoder is claimed whole or not at all."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transom.authoring.refusing import refusals
from transom.contract import Claim
from transom.errors import option
from transom.graph.reading import linear_weight
from transom.graph.sparse import is_attention
from transom.programs import fusing
from transom.programs.reading import GraphReader, Op, UnsupportedNode
from transom_mobile_export.qnn import probing
from transom_mobile_export.qnn.lowering import HtpKernels
from transom_mobile_export.qnn.parts import GraphPart, layers_of
from transom_mobile_export.qnn.precision import HEAD, SMALL, SMALL_SHARE, QnnPrecision, resolve

if TYPE_CHECKING:
    from transom.contract import Device, Options
    from transom.graph import Graph


@dataclass(frozen=True)
class HtpDecoder:
    """A decoder as this backend writes it."""

    reader: GraphReader
    embed: Op
    layers: tuple[GraphPart, ...]
    """Each layer as a part of its own."""


def read_decoder(graph: Graph, precision: QnnPrecision) -> HtpDecoder:
    """Read a decoder.

    Raises:
        UnsupportedNode: there is no operator for a node.
        UnsupportedError: the decoder cannot be cut between layers.
    """
    reader = GraphReader(graph, HtpKernels())
    ops = fusing.fuse_biases(fusing.fuse_scales(list(reader.ops)))
    embeds = [op for op in ops if op.kind == "embed"]
    if len(embeds) != 1 or ops[0] is not embeds[0]:
        raise UnsupportedNode(reader.node(embeds[-1]), "the host looks up one embedding, which comes before all layers")
    _mark_small(ops, len(reader.decoder.layers))
    order = [op.index for op in ops if op.kind == "attend"]
    if order != list(range(len(reader.decoder.layers))):
        first = next(n for n in graph.nodes() if is_attention(n))
        raise UnsupportedNode(first, "attention layers that are out of order")
    windows = {layer.sliding_window for layer in reader.decoder.layers} - {0}
    if len(windows) > 1:
        reason = f"sliding windows of {' and '.join(map(str, sorted(windows)))} tokens: all layers need the same one"
        raise UnsupportedNode(next(n for n in graph.nodes() if is_attention(n)), reason)
    if windows and not reader.sparsity.dense:
        off = option("sparsity", "off")
        reason = f"sparse attention together with a sliding window is not written for the HTP: use {off}"
        raise UnsupportedNode(next(n for n in graph.nodes() if is_attention(n)), reason)
    return HtpDecoder(reader, embeds[0], layers_of(ops, reader.logits, precision))


def _mark_small(ops: Sequence[Op], layers: int) -> None:
    """Mark small products for `QnnPrecision.weights_of`: keys and values that several query heads share."""
    products = [d for d in ops if d.kind == "linear" and d.by != HEAD and d.weight is not None]
    sizes = {id(d): math.prod(d.weight.shape) for d in products if d.weight is not None}
    for op in products:
        if sizes[id(op)] * layers <= SMALL_SHARE * sum(sizes.values()):
            op.by = SMALL


def claims(graph: Graph, device: Device, options: Options) -> Iterator[Claim]:
    """One claim for each node, in order.

    Raises:
        OptionError: the HTP does not support the precision.
    """
    precision = resolve(options, probing.target(device).htp_arch)
    refused = refusals(graph, lambda: read_decoder(graph, precision))
    for node in graph.nodes():
        name = str(node.name)
        if name in refused:
            yield Claim(name, False, refused[name])
        else:
            quantized = linear_weight(node) is not None or is_attention(node)
            yield Claim(name, True, exact=not (precision.quantized and quantized))
