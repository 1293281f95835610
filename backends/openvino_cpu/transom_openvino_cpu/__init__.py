"""Transom's backend for CPUs: decoders by native kernels or OpenVINO, other ONNX graphs by OpenVINO."""

from __future__ import annotations

from collections.abc import Iterable

from transom.contract import Backend, hookimpl
from transom_openvino_cpu.backend import OpenVinoCpu

__all__ = ["OpenVinoCpu", "transom_backends"]


@hookimpl
def transom_backends() -> Iterable[Backend]:
    return [OpenVinoCpu()]
