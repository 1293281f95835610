"""Load: open an artifact and make its session."""

from __future__ import annotations

from pathlib import Path

from transom.contract import Artifact, Device, Options
from transom.errors import EngineError
from transom.signature import Decoder
from transom_mobile_export.genai.compiling import DATA_FILE, DECODER_FILE, MODEL_FILE
from transom_mobile_export.genai.running import DAMAGED, Runner
from transom_mobile_export.genai.session import DecoderSession


def load_artifact(artifact: Artifact, device: Device, options: Options) -> DecoderSession:
    """A session over the artifact.

    Raises:
        EngineError: the files are not what this backend wrote.
        MissingExtra: ONNX Runtime is not installed.
    """
    files = {name: path for name, path in artifact.files.items() if isinstance(path, Path)}
    try:
        decoder = Decoder.from_json(files[DECODER_FILE].read_text(encoding="utf-8"))
        model, _ = files[MODEL_FILE], files[DATA_FILE]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise EngineError(f"This compiled model is damaged: {e}", DAMAGED) from e
    built_for = int(artifact.requires.get("context", decoder.context))
    context = min(int(str(options.get("context") or decoder.context)), decoder.context, built_for)
    runner = Runner(model, decoder, int(str(options.get("threads") or device.cores)))
    return DecoderSession(runner, decoder, context)
