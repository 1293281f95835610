"""Load: open an artifact and create its session."""

from __future__ import annotations

from transom.authoring.opening import context_of, paths_of, reading_artifact, threads_of
from transom.contract import Artifact, Device, Limits, Options
from transom.sessions import BufferedSession
from transom.signature import Decoder
from transom_mobile_export.onnx.compiling import DATA_FILE, DECODER_FILE, MODEL_FILE
from transom_mobile_export.onnx.running import DAMAGED, Runner

SEQUENCES, TOKENS = 64, 4096
"""Limits of one step."""


def load_artifact(artifact: Artifact, device: Device, options: Options) -> BufferedSession:
    """A session over the artifact.

    Raises:
        EngineError: this backend did not write the files.
        MissingExtra: ONNX Runtime is not installed.
    """
    files = paths_of(artifact)
    with reading_artifact(DAMAGED):
        decoder = Decoder.from_json(files[DECODER_FILE].read_text(encoding="utf-8"))
        model, _ = files[MODEL_FILE], files[DATA_FILE]
        built_for = int(artifact.requires.get("context", decoder.context))
        if built_for < 1:
            raise ValueError(f"a context of {built_for} tokens")
    context = context_of(options, decoder.context, built_for)
    runner = Runner(model, decoder, threads_of(options, device))
    limits = Limits(SEQUENCES, max(TOKENS, context), context, page_tokens=0)
    return BufferedSession(runner, decoder.vocabulary, limits)
