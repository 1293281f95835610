"""Which nodes the backend claims, and why it refuses the others. A decoder is claimed whole or not at all."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transom.authoring.refusing import claim, refusals
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
    import onnx_ir as ir

    from transom.contract import Device, Options
    from transom.graph import Graph
    from transom.signature import Decoder


DIVERGENCES = {"int8": 0.1, "int4": 0.5}
"""Nats, by the form of the weights. On Qualcomm's emulator, SmolLM2-135M measures 0.014 with int8 and 0.21 with int4 on
16 tokens."""


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
    for node in filter(is_attention, graph.nodes()):
        if reason := _wrong_window(node, reader.decoder):
            raise UnsupportedNode(node, reason)
    return HtpDecoder(reader, embeds[0], layers_of(ops, reader.logits, precision))


def _wrong_window(node: ir.Node, decoder: Decoder) -> str:
    """Why the sliding window of an attention node is not written; empty if it has none, or if it is."""
    windows = {layer.sliding_window for layer in decoder.layers} - {0}
    if not decoder.layers[node.attributes.get_int("layer", 0)].sliding_window:
        return ""
    if len(windows) > 1:
        return f"sliding windows of {' and '.join(map(str, sorted(windows)))} tokens: all layers need the same one"
    if node.attributes.get_string("sparsity", "dense") == "dense":
        return ""
    off = option("sparsity", "off")
    return f"sparse attention together with a sliding window is not written for the HTP: use {off}"


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
    decoder = graph.decoder
    refused = refusals(
        graph,
        HtpKernels(),
        lambda: read_decoder(graph, precision),
        lambda node, layer: "" if decoder is None else _wrong_window(node, decoder),
    )
    for node in graph.nodes():
        if (answer := claim(node, refused)) is not None:
            yield answer
        else:
            inexact = precision.quantized and (linear_weight(node) is not None or is_attention(node))
            yield Claim(
                str(node.name), True, exact=not inexact, divergence=DIVERGENCES[precision.weights] if inexact else None
            )
