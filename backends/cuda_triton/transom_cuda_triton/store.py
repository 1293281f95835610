"""Data that stays on the device from load to close: weights, and tables of rotary embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from transom.errors import EngineError
from transom_cuda_triton.packing import ALIGNMENT, TritonMatrix
from transom_cuda_triton.program import TritonProgram

TORCH: dict[str, torch.dtype] = {
    "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "u8": torch.uint8,
    "fp8e4nv": torch.float8_e4m3fn,
}  # fmt: skip
"""torch types by Triton's names."""


class Store:
    """The weights of a program on a device.

    Args:
        weights: the file of weights that the program refers to.
        context: number of positions in the rotary tables.

    Raises:
        EngineError: the file does not fit the program, or exceeds the device's memory.
    """

    def __init__(self, program: TritonProgram, weights: Path, device: torch.device, context: int) -> None:
        size = weights.stat().st_size
        if size != program.weight_bytes:
            raise EngineError(
                f"This compiled model is damaged: {weights.name} has {size} bytes in place of {program.weight_bytes}",
                "Remove it with: transom cache clear",
            )
        self._program, self.device = program, device
        self._bytes = _to_device(weights, size, device)
        self.nothing = torch.zeros(ALIGNMENT // 4, dtype=torch.float32, device=device)
        """Stands in for a vector that is not used."""
        self._matrices = [self._tensors(m) for m in program.matrices]
        self._ropes = [self._tables(r.at, r.count, r.factor, context) for r in program.ropes]
        self._unrotated: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._context = context

    def _take(self, at: int, count: int, number: str) -> torch.Tensor:
        """`count` numbers at offset `at`."""
        size = count * TORCH[number].itemsize
        if at < 0 or at % ALIGNMENT or at + size > self._program.weight_bytes:
            raise EngineError("This compiled model is damaged", "Remove it with: transom cache clear")
        return self._bytes[at : at + size].view(TORCH[number])

    def _tensors(self, m: TritonMatrix) -> dict[str, torch.Tensor]:
        if not m.bits:
            return {"TABLE": self._take(m.at, m.rows * m.columns, self._program.number).view(m.rows, m.columns)}
        if m.block <= 0 or m.columns % m.block:
            raise EngineError("This compiled model is damaged", "Remove it with: transom cache clear")
        if m.float8:
            codes = self._take(m.at, m.rows * m.columns, "fp8e4nv")
            return {"QUANTS": codes, "SCALES": self._take(m.scales, m.rows, m.scale_number)}
        blocks = m.rows * (m.columns // m.block)
        scales = self._take(m.scales, blocks, m.scale_number)
        return {
            "QUANTS": self._take(m.at, m.rows * m.columns * m.bits // 8, "u8"),
            "SCALES": scales,
            "OFFSETS": scales if m.offsets < 0 else self._take(m.offsets, blocks, m.offset_number),
        }

    def _tables(self, at: int, count: int, factor: float, context: int) -> tuple[torch.Tensor, torch.Tensor]:
        frequencies = self._take(at, count, "fp32").cpu().numpy()
        angles = np.arange(context, dtype=np.float32)[:, None] * frequencies
        waves = (np.cos(angles), np.sin(angles))
        cos, sin = (torch.from_numpy(np.float32(factor) * wave).to(self.device) for wave in waves)
        return cos, sin

    def vector(self, at: int, count: int) -> torch.Tensor:
        """float32 [count] at offset `at`."""
        return self._take(at, count, "fp32")

    def matrix(self, index: int) -> dict[str, torch.Tensor]:
        """The parts of a matrix, by kernel argument: TABLE, or QUANTS, SCALES and, for blocks, OFFSETS."""
        return self._matrices[index]

    def rope(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, float32 [context, rotated / 2]."""
        return self._ropes[index]

    def no_rope(self, half: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tables of the identity rotation, for keys that are stored unrotated."""
        if half not in self._unrotated:
            shape = (self._context, half)
            self._unrotated[half] = torch.ones(shape, device=self.device), torch.zeros(shape, device=self.device)
        return self._unrotated[half]

    def empty(self, shape: tuple[int, ...], number: str) -> torch.Tensor:
        """Uninitialized scratch memory for one operator; `number` is Triton's type name."""
        return torch.empty(shape, dtype=TORCH[number], device=self.device)

    def numbers(self, begin: int, count: int) -> torch.Tensor:
        """int64 [count]: begin, begin + 1, …"""
        return torch.arange(begin, begin + count, device=self.device)

    @staticmethod
    def multiply(x: torch.Tensor, matrix: torch.Tensor, out: torch.Tensor) -> None:
        """out = x · matrixᵀ, with sums in float32; `out` may be wider than `x`, as logits are."""
        if out.dtype == x.dtype:
            torch.matmul(x, matrix.T, out=out)
        elif x.is_cuda:
            out.copy_(torch.mm(x, matrix.T, out_dtype=out.dtype))
        else:
            out.copy_(x.to(out.dtype) @ matrix.T.to(out.dtype))

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        tables = [t for pair in (*self._ropes, *self._unrotated.values()) for t in pair]
        return sum(t.numel() * t.element_size() for t in (self._bytes, *tables))


def _to_device(weights: Path, size: int, device: torch.device) -> torch.Tensor:
    mapped: Any = np.memmap(weights, np.uint8, "r") if size else np.zeros(0, np.uint8)
    try:
        on_device = torch.empty(size, dtype=torch.uint8, device=device)
        for begin in range(0, size, _PIECE):
            part = np.array(mapped[begin : begin + _PIECE])  # a copy: torch needs writable memory
            on_device[begin : begin + len(part)].copy_(torch.from_numpy(part))
    except torch.OutOfMemoryError as e:
        raise EngineError(
            f"The weights take {size / 2**30:.1f} GiB, more than {device} has free", "Close other programs that use it"
        ) from e
    return on_device


_PIECE = 256 << 20
"""Bytes copied to the device at once."""
