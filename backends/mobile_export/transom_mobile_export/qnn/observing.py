"""Observes the ranges of a decoder's values on some texts, by running its float graphs in onnxruntime on the CPU.

A few layers at a time are written and run, so that only these are in memory in float32; the hidden state of all texts
is passed on. For each value the graph returns only the smallest and the largest number, and for each input of a matrix
the sums of squares of its columns.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from transom.errors import SourceError
from transom.graph.weights import Array, Weight, dequantize
from transom.programs.onnx_writing import FLOAT, IR_VERSION
from transom_mobile_export.qnn.encoding import HEADROOM, MARGIN
from transom_mobile_export.qnn.lowering import MASK, MASK_WINDOW, UNSEEN, LoweredPart, lower
from transom_mobile_export.qnn.parts import joined

if TYPE_CHECKING:
    from transom.programs.reading import Op
    from transom.signature import Decoder
    from transom_mobile_export.qnn.claims import HtpDecoder
    from transom_mobile_export.qnn.parts import GraphPart

Range = tuple[float, float]
AT_ONCE = 2 << 30
"""Bytes of float32 weights that are in memory at once, unless a single layer has more."""
LEAST, MOST, SQUARES = ".least", ".most", ".squares"
SMALL = 1024
"""Largest initializer, in bytes, that is stored in the ONNX file itself."""


@dataclass(frozen=True)
class Seen:
    """The values observed on texts."""

    ranges: Mapping[str, Range]
    """The smallest and the largest number of each input and each value of the graphs, by name."""
    mask_low: float
    """Mask value of the quantized graphs for keys that are not seen."""
    widest: float = 0.0
    """The largest magnitude in the hidden state."""
    squares: Mapping[str, Array] = field(default_factory=dict)
    """Sum of squares of each column of a matrix's input, by the name of the matrix."""


def observe(model: HtpDecoder, texts: Sequence[Sequence[int]], progress: Callable[[float], None]) -> Seen:
    """Run texts through the float graphs.

    Args:
        texts: token ids; each is read from position 0.

    Raises:
        SourceError: a value is not finite.
    """
    reader = model.reader
    spans: list[float] = []
    widest = 0.0
    squares: dict[str, Array] = {}
    seen: dict[str, Range] = {}
    context = max(map(len, texts))

    def note(name: str, least: float, most: float) -> None:
        if not np.isfinite([least, most]).all():
            raise SourceError(
                f"The model computes values that are not finite, first seen at {name}",
                "Download or convert the checkpoint again",
            )
        low, high = seen.get(name, (least, most))
        seen[name] = min(low, least), max(high, most)

    hidden = [embedded(model.embed, text) for text in texts]
    groups = grouped(model.layers)
    for done, part in enumerate(groups):
        lowered = lower(reader, part, tokens="tokens", cached="cached", context=context)
        given = _with_extremes(lowered)
        _with_squares(lowered)
        with RunningPart(lowered) as running:
            for i, text in enumerate(texts):
                note("hidden", float(hidden[i].min()), float(hidden[i].max()))
                found = running(prefill(reader.decoder, part, hidden[i], np.arange(len(text))))
                for name in given:
                    note(name, float(found[name + LEAST]), float(found[name + MOST]))
                for matrix, name in lowered.inputs.items():
                    squares[matrix] = squares.get(matrix, 0.0) + found[name + SQUARES]
                if not part.last:
                    hidden[i] = found["hidden_out"]
        spans += [seen[scores][1] - seen[scores][0] for scores in lowered.masked.values()]
        widest = max(widest, *(abs(edge) for name in lowered.wide for edge in seen[name]))
        progress((done + 1) / len(groups))
    return Seen(seen, -(HEADROOM * max(spans) + MARGIN), widest, squares)


def embedded(embed: Op, ids: Sequence[int]) -> Array:
    """The input of the first layer, float32 [1, tokens, hidden]."""
    assert embed.weight is not None
    hidden: Array = (rows_of(embed.weight, ids) * np.float32(embed.scale))[None]
    return hidden


def rows_of(weight: Weight, ids: Sequence[int]) -> Array:
    """Rows of a table, float32 [rows, columns]."""
    return dequantize(weight, np.asarray(ids, np.int64)).astype(np.float32)


def grouped(layers: Sequence[GraphPart]) -> list[GraphPart]:
    """Layers that are run together."""
    groups: list[GraphPart] = []
    for layer in layers:
        if groups and _float_bytes(groups[-1]) + _float_bytes(layer) <= AT_ONCE:
            groups[-1] = joined(groups[-1], layer)
        else:
            groups.append(layer)
    return groups


def _float_bytes(part: GraphPart) -> int:
    return sum(4 * d.weight.shape[0] * d.weight.shape[1] for own in part.layers for d in own if d.weight is not None)


def _with_extremes(lowered: LoweredPart) -> list[str]:
    """Add the smallest and the largest number of each value to a graph's outputs; returns the values' names."""
    graph = lowered.graph
    names = []
    for node in list(graph):
        out = node.outputs[0]
        if out.dtype != FLOAT:
            continue
        names.append(str(out.name))
        for op_type, suffix in (("ReduceMin", LEAST), ("ReduceMax", MOST)):
            reduced = ir.Node(
                "", op_type, [out], [ir.AttrInt64("keepdims", 0)], num_outputs=1, name=f"{out.name}{suffix}"
            )
            reduced.outputs[0].name, reduced.outputs[0].type = reduced.name, ir.TensorType(FLOAT)
            reduced.outputs[0].shape = ir.Shape([])
            graph.append(reduced)
            graph.outputs.append(reduced.outputs[0])
    return names


def _with_squares(lowered: LoweredPart) -> None:
    """Add the sum of squares of each column of each matrix's input to a graph's outputs."""
    graph = lowered.graph
    values = {v.name: v for node in graph for v in node.outputs}
    axes = ir.Value(name="axes_of_squares", const_value=ir.tensor(np.array([0, 1]), name="axes_of_squares"))
    graph.register_initializer(axes)
    for name in dict.fromkeys(lowered.inputs.values()):
        node = ir.Node(
            "", "ReduceSumSquare", [values[name], axes], [ir.AttrInt64("keepdims", 0)], num_outputs=1,
            name=f"{name}{SQUARES}",
        )  # fmt: skip
        node.outputs[0].name, node.outputs[0].type = node.name, ir.TensorType(FLOAT)
        graph.append(node)
        graph.outputs.append(node.outputs[0])


class RunningPart:
    """The unchanged graph of a part in onnxruntime; a context manager.

    Optimizations are off: onnxruntime would multiply int8 matrices with kernels of its own (1.32).
    """

    def __init__(self, lowered: LoweredPart) -> None:
        self._graph = lowered.graph

    def __enter__(self) -> RunningPart:
        import onnxruntime

        self._folder = tempfile.TemporaryDirectory(prefix="transom-qnn-")
        try:
            path = Path(self._folder.name) / "part.onnx"
            model = ir.Model(self._graph, ir_version=IR_VERSION)
            ir.save(model, path, external_data="part.weights", size_threshold_bytes=SMALL)
            options = onnxruntime.SessionOptions()
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.log_severity_level = 3
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except BaseException:
            self._folder.cleanup()
            raise
        self._names = [v.name for v in self._session.get_outputs()]
        self._inputs = {v.name for v in self._session.get_inputs()}
        return self

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        given = {name: value for name, value in inputs.items() if name in self._inputs}
        return dict(zip(self._names, self._session.run(None, given), strict=True))

    def __exit__(self, *_: object) -> None:
        del self._session
        self._folder.cleanup()


def prefill(
    decoder: Decoder, part: GraphPart, hidden: Array, positions: Array, cache: Any = np.float32
) -> dict[str, Array]:
    """Inputs of a graph with dynamic dimensions for a text with an empty cache; some graphs do not need all of them."""
    tokens = len(positions)
    inputs: dict[str, Array] = {
        "hidden": hidden, "positions": positions[None].astype(np.int32), "row": np.arange(tokens, dtype=np.int32),
        MASK: mask(positions, 0),
    }  # fmt: skip
    windows = {layer.sliding_window for layer in decoder.layers} - {0}
    for window in windows:
        inputs[MASK_WINDOW] = mask(positions, window)
    for i in range(part.first, part.end):
        layer = decoder.layers[i]
        for what, columns in (("key", layer.head_dim), ("value", layer.value_dim)):
            inputs[f"past_{what}.{i}"] = np.zeros((1, layer.kv_heads, 0, columns), cache)
    return inputs


def mask(positions: Array, window: int) -> Array:
    """float32 [1, 1, S, S]: the mask for a text's own tokens."""
    behind = positions[:, None] - positions[None]
    seen = (behind >= 0) & ((behind < window) | (not window))
    return np.where(seen, 0.0, UNSEEN).astype(np.float32)[None, None]
