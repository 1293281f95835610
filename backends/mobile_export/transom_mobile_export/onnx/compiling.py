"""Compile: write a graph as an ONNX model with a file of weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from transom.authoring.folders import artifact_folder
from transom.authoring.opening import context_of
from transom.contract import Artifact, Options, Progress
from transom.programs.reading import GraphReader
from transom_mobile_export.onnx import quantizing
from transom_mobile_export.onnx.lowering import GenAiKernels, lower
from transom_mobile_export.onnx.precision import resolve
from transom_mobile_export.onnx.probing import FORMAT, NEEDED
from transom_mobile_export.onnx.writing import RuntimeWriter

if TYPE_CHECKING:
    from transom.graph import Graph
    from transom.signature import Decoder

MODEL_FILE, DATA_FILE, DECODER_FILE = "model.onnx", "model.onnx.data", "decoder.json"
MEMORY_FILE, LIBRARIES_FILE = "memory.json", "libraries.json"
LIBRARIES = ("libonnxruntime.so", "libonnxruntime-genai.so")
"""Libraries that an Android app needs, by file name; the runner needs only the first."""
CHUNK = 512
"""Tokens of a prompt that run at once: the logits of a whole prompt would take a large part of a phone's memory."""
ROWS = 40
"""Numbers that a run takes per token and hidden column, besides the logits: 39 were measured."""


def compile_graph(graph: Graph, options: Options, progress: Progress) -> Artifact:
    """Compile a decoder whose nodes were all claimed. Its files are in a temporary folder, which the host empties.

    A context shorter than the model's own is built in: rotation tables have a row for each position, and those of a
    long context would be a large part of a small model.

    Raises:
        OptionError: a weight is too large for the requested precision.
        SourceError: a weight to quantize is not finite.
    """
    import onnx_ir as ir

    decoder = graph.decoder
    assert decoder is not None
    context = context_of(options, decoder.context)
    precision = resolve(options)
    reader = GraphReader(graph, GenAiKernels())
    with artifact_folder("transom-onnx-") as folder:
        with RuntimeWriter("decoder", folder / DATA_FILE) as write:
            lowered = lower(reader, precision, context, write, lambda share: progress("write", share))
        ir.save(lowered.model, folder / MODEL_FILE)
        progress("write", 1.0)
    size = (folder / DATA_FILE).stat().st_size
    files: dict[str, bytes | Path] = {
        MEMORY_FILE: json.dumps(_memory(decoder, context, size, half=precision.number == "float16")).encode(),
        LIBRARIES_FILE: json.dumps(LIBRARIES).encode(),
        MODEL_FILE: folder / MODEL_FILE, DATA_FILE: folder / DATA_FILE, DECODER_FILE: decoder.to_json().encode(),
    }  # fmt: skip
    requires = {NEEDED: FORMAT} | ({"context": str(context)} if context < decoder.context else {})
    notes = [f"precision: {precision.describe(lowered.forms)}", *quantizing.notes(lowered.quantized)]
    return Artifact(files, requires, notes)


def _memory(decoder: Decoder, context: int, size: int, *, half: bool) -> dict[str, int]:
    """Bytes: the file of weights, the cache of one token, and the working memory. ONNX Runtime repacks integer matrices
    into about 1.25 times their size in the file, and a chunk has activations and logits in float32."""
    width = sum(layer.kv_heads * (layer.head_dim + layer.value_dim) for layer in decoder.layers)
    rows = min(CHUNK, context) * (ROWS * decoder.hidden + decoder.vocabulary) * 4
    return {"weights": size, "cache_per_token": width * (2 if half else 4), "workspace": size // 4 + rows}
