"""Compile: a graph as an ONNX model with a file of weights."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.contract import Artifact, Options, Progress
from transom.programs.drafting import Drafting
from transom_mobile_export.genai import rounding
from transom_mobile_export.genai.lowering import GenAiKernels, lower
from transom_mobile_export.genai.precision import resolve
from transom_mobile_export.genai.probing import FORMAT, NEEDED
from transom_mobile_export.genai.writing import RuntimeWriter

if TYPE_CHECKING:
    from transom.graph import Graph

PREFIX = "transom-onnx-"
MODEL_FILE, DATA_FILE, DECODER_FILE = "model.onnx", "model.onnx.data", "decoder.json"


def compile_graph(graph: Graph, options: Options, progress: Progress) -> Artifact:
    """The artifact of a decoder all of whose nodes were claimed. Its files lie in a temporary folder, which the host
    empties.

    A context that is shorter than the model's own is built in: tables of rotations have a row for each position, and
    those of a long context would be a large part of a small model.

    Raises:
        OptionError: a weight is too large for the precision that was asked for.
        SourceError: a weight that is to be rounded is not finite.
    """
    import onnx_ir as ir

    decoder = graph.decoder
    assert decoder is not None
    asked: Any = options.get("context")
    context = min(int(asked or decoder.context), decoder.context)
    precision = resolve(options)
    drafting = Drafting(graph, GenAiKernels())
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    try:
        with RuntimeWriter("decoder", folder / DATA_FILE) as write:
            lowered = lower(drafting, precision, context, write, lambda share: progress("write", share))
        ir.save(lowered.model, folder / MODEL_FILE)
        progress("write", 1.0)
    except BaseException:  # a cancelled compile leaves nothing behind either
        shutil.rmtree(folder, ignore_errors=True)
        raise
    files: dict[str, bytes | Path] = {
        MODEL_FILE: folder / MODEL_FILE, DATA_FILE: folder / DATA_FILE, DECODER_FILE: decoder.to_json().encode(),
    }  # fmt: skip
    requires = {NEEDED: FORMAT} | ({"context": str(context)} if context < decoder.context else {})
    notes = [f"precision: {precision.describe(lowered.forms)}", *rounding.notes(lowered.rounded)]
    return Artifact(files, requires, notes)
