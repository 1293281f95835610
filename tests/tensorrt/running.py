"""Runs a lowered network in onnxruntime without optimizations, step by step with its caches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from transom.graph import Graph
from transom.programs.reading import GraphReader
from transom_tensorrt.compiling import requantize
from transom_tensorrt.lowering import LoweredNetwork, RtxKernels, lower
from transom_tensorrt.precision import RtxPrecision

Array = np.ndarray[Any, np.dtype[Any]]
NUMPY: dict[str, Any] = {"float16": np.float16, "float32": np.float32}


def session(model: ir.Model, folder: Path) -> ort.InferenceSession:
    """onnxruntime over what TensorRT's parser is given."""
    folder.mkdir(parents=True, exist_ok=True)
    ir.save(model, folder / "model.onnx", external_data="model.weights", size_threshold_bytes=1024)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    return ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])


class Running:
    """A lowered decoder and the caches of a batch of sequences."""

    def __init__(self, graph: Graph, precision: RtxPrecision, context: int, folder: Path, **more: Any) -> None:
        reader = GraphReader(graph, RtxKernels())
        if precision.number != "float32":
            requantize(reader.ops, lambda share: None)
        self.lowered: LoweredNetwork = lower(reader, precision, context, **more)
        self._session = session(self.lowered.model, folder)

    def start(self, batch: int = 1) -> dict[str, Array]:
        """Empty caches; what is in them must not matter."""
        kept = self.lowered.kept
        return {k.input: np.full((batch, *k.shape), 7, NUMPY[k.number]) for k in kept}

    def step(self, caches: dict[str, Array], ids: Sequence[Sequence[int]], past: Sequence[int]) -> Array:
        """float32 [batch * tokens, vocabulary]; the caches are what they are afterwards."""
        given = np.asarray(ids, np.int64)
        inputs = {"input_ids": given, "past": np.asarray(past, np.int64), "rows": np.arange(given.size)}
        names = ["logits", *(k.output for k in self.lowered.kept)]
        logits, *after = self._session.run(names, {**inputs, **caches})
        for kept, value in zip(self.lowered.kept, after, strict=True):
            caches[kept.input] = value
        return np.asarray(logits)

    def logits(self, parts: Sequence[Sequence[int]]) -> Array:
        """Of one sequence that comes in parts, float32 [tokens, vocabulary]."""
        caches, at, found = self.start(), 0, []
        for part in parts:
            found.append(self.step(caches, [part], [at]))
            at += len(part)
        return np.concatenate(found)
