"""Measures the quantization error of a decoder: float and quantized graphs on one text, product by product.

Both run in onnxruntime on the CPU. Each gets the results of its own earlier layers, so that errors are cumulative. The
quantized graphs compute there what the HTP computes, except for the last bit of a code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from transom.graph.weights import Array
from transom_mobile_export.qnn.encoding import add_quantization
from transom_mobile_export.qnn.lowering import LoweredPart, lower
from transom_mobile_export.qnn.observing import RunningPart, embedded, grouped, prefill

if TYPE_CHECKING:
    from transom_mobile_export.qnn.claims import HtpDecoder
    from transom_mobile_export.qnn.lowering import Matrices
    from transom_mobile_export.qnn.observing import Seen
    from transom_mobile_export.qnn.precision import QnnPrecision

LONGEST = 64
"""Largest number of tokens of the text."""


@dataclass(frozen=True)
class Deviation:
    """The deviation of one value of the quantized decoder from the float decoder."""

    node: str
    """The node of the neutral graph."""
    layer: int
    what: str
    """`"product"`, or `"residual"`: the hidden state after a layer."""
    error: float
    """Norm of the difference, divided by the norm of the float value."""


def measure(
    model: HtpDecoder,
    precision: QnnPrecision,
    seen: Seen,
    matrices: Matrices,
    text: Sequence[int],
    progress: Callable[[float], None],
) -> list[Deviation]:
    """The error of every product and of the hidden state after every layer, worst first."""
    text = text[:LONGEST]
    positions = np.arange(len(text))
    exact = quantized = embedded(model.embed, text)
    found: list[Deviation] = []
    groups = grouped(model.layers)
    cache = ir.DataType[precision.cache.upper()]
    sizes: dict[str, Any] = {"tokens": "tokens", "cached": "cached", "context": len(text)}
    for done, part in enumerate(groups):
        plain = lower(model.reader, part, **sizes)
        with RunningPart(_showing(plain)) as running:
            wanted = running(prefill(model.reader.decoder, part, exact, positions))
        graph = _showing(lower(model.reader, part, **sizes, matrices=matrices))
        add_quantization(graph, seen, cache)
        with RunningPart(graph) as running:
            got = running(prefill(model.reader.decoder, part, quantized, positions, cache.numpy()))
        found += [Deviation(w.node, w.layer, w.what, relative(wanted[w.name], got[w.name])) for w in plain.watched]
        if not part.last:
            exact, quantized = wanted["hidden_out"], got["hidden_out"]
        progress((done + 1) / len(groups))
    return sorted(found, key=lambda d: -d.error)


def _showing(lowered: LoweredPart) -> LoweredPart:
    """The graph with all watched values among its outputs."""
    given = {v.name for v in lowered.graph.outputs}
    values = {v.name: v for node in lowered.graph for v in node.outputs}
    lowered.graph.outputs.extend(values[w.name] for w in lowered.watched if w.name not in given)
    return lowered


def relative(wanted: Array, got: Array) -> float:
    """Norm of the difference, divided by the norm of `wanted`."""
    norm = float(np.linalg.norm(wanted))
    return float(np.linalg.norm(got - wanted)) / norm if norm else 0.0
