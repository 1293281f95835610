"""What the native library's kernels support: see `transom.programs.reading.Kernels`."""

from __future__ import annotations

from transom.graph.weights import Blocked, Weight
from transom.sparsity import Sparsity
from transom_openvino_cpu.native import packing
from transom_openvino_cpu.native.layout import TILE
from transom_openvino_cpu.native.policies import unsupported
from transom_openvino_cpu.precision import CpuPrecision


class NativeKernels:
    """The native kernels at one precision."""

    tile = TILE
    largest_head = 256
    largest_group = 64
    interleaved = False
    float8 = False

    def __init__(self, precision: CpuPrecision) -> None:
        self._precision = precision

    def matrix(self, weight: Weight) -> str:
        return packing.packable(weight)

    def by(self, weight: Weight, *, head: bool) -> str:
        """`"int8"`, `"bf16"` or `"f32"`. The vocabulary matrix is always multiplied in float32."""
        to_int8 = self._precision.dense_to_int8 and weight.shape[1] % packing.SMALLEST_BLOCK == 0
        if self._precision.dynamic and not head and (isinstance(weight, Blocked) or to_int8):
            return "int8"
        if self._precision.hint == "bf16" and not head:
            return "bf16"
        return "f32"

    def policy(self, policy: Sparsity) -> str:
        return unsupported(policy)
