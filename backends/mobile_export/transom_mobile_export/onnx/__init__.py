"""The backend `onnx`: a decoder in the layout of ONNX Runtime GenAI."""

from __future__ import annotations

from collections.abc import Iterable

from transom.contract import Backend, hookimpl
from transom_mobile_export.onnx.backend import OnnxDecoder

__all__ = ["OnnxDecoder", "transom_backends"]


@hookimpl
def transom_backends() -> Iterable[Backend]:
    return [OnnxDecoder()]
