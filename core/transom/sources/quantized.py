"""The packing of a quantized checkpoint's weights, by the settings in its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transom.errors import SourceError
from transom.models.values import Values
from transom.sources.compressed import compressed_tensors
from transom.sources.packed import Packing, Stored, awq, gptq

_DAMAGED = "The checkpoint is damaged or incomplete: download it again"


def packing_of(config: Mapping[str, Any], stored: Stored, where: str) -> Packing | None:
    """The packing that config.json describes, or None for plain weights.

    Raises:
        SourceError: an unknown method or setting; the message has its name and value.
    """
    settings = config.get("quantization_config") or config.get("compression_config")
    if not settings and isinstance(config.get("text_config"), Mapping):
        settings = config["text_config"].get("quantization_config")
    if not settings:
        return None
    if not isinstance(settings, Mapping):
        raise SourceError(f"quantization_config of {where} is not a table of settings", _DAMAGED)
    values = Values(settings, f"quantization_config of {where}")
    method = values.get("quant_method")
    if method == "gptq":
        return gptq(values, stored, where)
    if method == "awq":
        return awq(values, stored, where)
    if method == "compressed-tensors":
        return compressed_tensors(values, stored, where)
    raise SourceError(
        f"The checkpoint in {where} is quantized by {method!r} (quantization_config.quant_method), which Transom does "
        "not read",
        "Transom reads gptq, awq and compressed-tensors; or load the model before quantization",
    )
