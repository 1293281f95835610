"""Load: open an artifact and make its session."""

from __future__ import annotations

from pathlib import Path

from transom.contract import Artifact, Device, Limits, Options
from transom.errors import EngineError
from transom.sessions import BufferedSession
from transom.signature import Decoder
from transom_mobile_export.onnx.compiling import DATA_FILE, DECODER_FILE, MODEL_FILE
from transom_mobile_export.onnx.running import DAMAGED, Runner

SEQUENCES, TOKENS = 64, 4096
"""Of one step, at most."""


def load_artifact(artifact: Artifact, device: Device, options: Options) -> BufferedSession:
    """A session over the artifact.

    Raises:
        EngineError: the files are not what this backend wrote.
        MissingExtra: ONNX Runtime is not installed.
    """
    files = {name: path for name, path in artifact.files.items() if isinstance(path, Path)}
    try:
        decoder = Decoder.from_json(files[DECODER_FILE].read_text(encoding="utf-8"))
        model, _ = files[MODEL_FILE], files[DATA_FILE]
        built_for = int(artifact.requires.get("context", decoder.context))
        if built_for < 1:
            raise ValueError(f"a context of {built_for} tokens")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise EngineError(f"This compiled model is damaged: {e}", DAMAGED) from e
    context = min(int(str(options.get("context") or decoder.context)), decoder.context, built_for)
    runner = Runner(model, decoder, int(str(options.get("threads") or device.cores)))
    limits = Limits(SEQUENCES, max(TOKENS, context), context, page_tokens=0)
    return BufferedSession(runner, decoder.vocabulary, limits)
