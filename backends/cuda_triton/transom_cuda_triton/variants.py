"""Kernel variants, each a kernel with its constants: the unit of ahead-of-time compilation and of launches.

Imports neither triton nor torch: launches are planned, stored and compared without them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class KernelVariant:
    """One kernel as compiled for one architecture."""

    kernel: str
    """Module and function in `transom_cuda_triton.kernels`: `"prefill.attend_blocks"`."""
    types: tuple[tuple[str, str], ...]
    """(argument, Triton's type) of every non-constant argument: `("Q", "*fp16")`, `("window", "i32")`."""
    constants: tuple[tuple[str, Any], ...]
    """(argument, value) of constant arguments; a value is a number, a bool or None."""
    warps: int = 4
    stages: int = 2

    @classmethod
    def of(
        cls, kernel: str, types: Mapping[str, str], constants: Mapping[str, Any], warps: int = 4, stages: int = 2
    ) -> KernelVariant:
        return cls(kernel, tuple(sorted(types.items())), tuple(sorted(constants.items())), warps, stages)


ALIGNMENT = 16
"""Pointers (in bytes) and strides (in elements) are multiples of this."""
STRIDES = ("_token", "_page", "_head")
"""Name endings of stride arguments."""


@dataclass(frozen=True)
class Code:
    """Machine code of a variant, and the data for launching it."""

    entry: str
    """The function's name."""
    cubin: bytes
    shared: int
    """Bytes of dynamic shared memory."""
    warps: int
    arguments: tuple[str, ...]
    """Names of the variant's arguments in the order of the function's parameters."""
    parameters: tuple[str, ...]
    """Parameter types: `"u64"` for a pointer, `"u32"`, `"f32"`, …; those behind `arguments` are Triton's, and null."""


class Launcher(Protocol):
    """Launches kernels, compiled on a card or by Triton's interpreter."""

    def __call__(self, variant: KernelVariant, grid: tuple[int, ...], arguments: Mapping[str, Any]) -> None:
        """Launch a variant with its non-constant arguments, by name: tensors and numbers.

        Args:
            grid: programs along one to three axes; if one is 0, nothing is launched.
        """
