"""Transom's backend for NVIDIA's RTX cards: decoders as TensorRT engines, built with or without the card."""

from __future__ import annotations

from collections.abc import Iterable

from transom.contract import Backend, hookimpl
from transom_tensorrt.backend import TensorRt

__all__ = ["TensorRt", "transom_backends"]


@hookimpl
def transom_backends() -> Iterable[Backend]:
    return [TensorRt()]
