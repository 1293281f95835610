"""Transom's backend for NVIDIA GPUs: decoders by Triton kernels that are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterable

from transom.contract import Backend, hookimpl
from transom_cuda_triton.backend import CudaTriton

__all__ = ["CudaTriton", "transom_backends"]


@hookimpl
def transom_backends() -> Iterable[Backend]:
    return [CudaTriton()]
