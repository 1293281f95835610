"""A kernel with its constants: what is compiled ahead of time, and what a launch names.

Imports no triton and no torch: a plan of launches is made, written down and compared without them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class KernelVariant:
    """One kernel as it is compiled for one architecture."""

    kernel: str
    """Module and function in `transom_cuda_triton.kernels`: `"prefill.attend_blocks"`."""
    types: tuple[tuple[str, str], ...]
    """(argument, Triton's type) of every argument that is no constant: `("Q", "*fp16")`, `("window", "i32")`."""
    constants: tuple[tuple[str, Any], ...]
    """(argument, value) of the others; a value is a number, a truth value or None."""
    warps: int = 4
    stages: int = 2

    @classmethod
    def of(
        cls, kernel: str, types: Mapping[str, str], constants: Mapping[str, Any], warps: int = 4, stages: int = 2
    ) -> KernelVariant:
        return cls(kernel, tuple(sorted(types.items())), tuple(sorted(constants.items())), warps, stages)


ALIGNMENT = 16
"""What pointers, in bytes, and strides, in numbers, are multiples of."""
STRIDES = ("_token", "_page", "_head")
"""Endings of the names of arguments that are strides."""


@dataclass(frozen=True)
class Code:
    """Machine code of a variant, and what a launch of it needs."""

    entry: str
    """The function's name."""
    cubin: bytes
    shared: int
    """Bytes of dynamic shared memory."""
    warps: int
    arguments: tuple[str, ...]
    """Names of the variant's arguments in the order of the function's parameters."""
    parameters: tuple[str, ...]
    """Their kinds: `"u64"` a pointer, `"u32"`, `"f32"`, …; those behind `arguments` are Triton's own, and null."""


class Launcher(Protocol):
    """Starts kernels: compiled ones on a card, or Triton's interpreter."""

    def __call__(self, variant: KernelVariant, grid: tuple[int, ...], arguments: Mapping[str, Any]) -> None:
        """Start a variant with every argument that is no constant, by name: tensors and numbers.

        Args:
            grid: programs along one to three axes; nothing is started where one is 0.
        """
