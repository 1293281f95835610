"""Files at a bundle's root for apps that open it with ONNX Runtime GenAI: the configuration and a README."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from transom.errors import OptionError
from transom.text.defaults import GenerationDefaults
from transom_mobile_export.onnx.genai_config import genai_config
from transom_mobile_export.onnx.readme import readme

CONFIG_FILE = "genai_config.json"


def app_files(
    manifest: Mapping[str, Any], variant: Mapping[str, Any], texts: Mapping[str, bytes]
) -> Mapping[str, bytes]:
    """`genai_config.json` and this backend's part of `README.md`: see `transom.contract_optional.AppBackend`.

    Raises:
        OptionError: the model is not a decoder, and GenAI runs only decoders.
    """
    decoder = manifest.get("decoder")
    if decoder is None:
        raise OptionError("ONNX Runtime GenAI runs decoders, and this model is not one", "Export it as another variant")
    generation = GenerationDefaults.from_json(json.loads(texts.get("generation.json", b"{}")))
    config = genai_config(decoder, variant, generation)
    part = readme(decoder, variant, generation, texts)
    return {CONFIG_FILE: (json.dumps(config, indent=2) + "\n").encode(), "README.md": part.encode()}
