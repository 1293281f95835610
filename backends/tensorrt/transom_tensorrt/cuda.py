"""Memory, copies and a stream of one card, through CUDA's runtime (the package `cuda-bindings`).

Pointers are integers. Work runs in order on one stream; the host waits for it only in `wait`. CUDA's current device
belongs to the thread, and other code in that thread may change it. Each call therefore sets it, which costs next to
nothing if it is already set.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from transom.contract import Device
from transom.errors import EngineError, MissingExtra
from transom_tensorrt.executing import Array
from transom_tensorrt.network import ALIGNMENT

_NON_BLOCKING = 1
"""cudaStreamNonBlocking: the stream does not wait for the default stream, on which no graph can be captured."""
_OUT_OF_MEMORY = 2
"""cudaErrorMemoryAllocation."""


class OutOfMemory(Exception):
    """The card has not enough free memory."""


class Pinned:
    """An array in pinned host memory, which the card copies from and to directly."""

    def __init__(self, pointer: int, shape: Sequence[int], dtype: Any) -> None:
        self.pointer, kind = pointer, np.dtype(dtype)
        size = int(np.prod(shape)) * kind.itemsize
        self.array: Array = np.frombuffer((ctypes.c_char * size).from_address(pointer), kind).reshape(shape)


class CudaCard:
    """One card, in use until `close`.

    Args:
        device: the host's record of the card.
        runtime: `cuda.bindings.runtime`; None: import it.

    Raises:
        MissingExtra: the package `cuda-bindings` is not installed.
        EngineError: CUDA does not show the card to this process, or the card does not respond.
    """

    def __init__(self, device: Device, runtime: Any = None) -> None:
        self.name = device.id
        self._cuda = _runtime() if runtime is None else runtime
        address = device.identity.removeprefix("pci:").split(" ")[0]
        status, number = self._cuda.cudaDeviceGetByPCIBusId(address.encode())
        if int(status):
            self._cuda.cudaGetLastError()
            raise EngineError(
                f"CUDA does not show {device.id} ({device.identity}) to this process: {self._describe(status)}",
                "Unset CUDA_VISIBLE_DEVICES or set it to that card, and check that nvidia-smi works",
            )
        self._number = int(number)
        self._memory: list[int] = []
        self._host: list[int] = []
        kinds = self._cuda.cudaMemcpyKind
        self._down, self._up = kinds.cudaMemcpyDeviceToHost, kinds.cudaMemcpyHostToDevice
        self._across = kinds.cudaMemcpyDeviceToDevice
        self._stream: Any = self._ask("make a stream", "cudaStreamCreateWithFlags", _NON_BLOCKING)

    @property
    def stream(self) -> int:
        """The stream's handle."""
        return int(self._stream)

    def use(self) -> None:
        """Make this card the calling thread's current device."""
        self._check("use the card", self._cuda.cudaSetDevice(self._number)[0])

    # memory -----------------------------------------------------------------------------------------------------------
    def free_bytes(self) -> int:
        free, _ = self._ask("say how much memory is free", "cudaMemGetInfo")
        return int(free)

    def allocate(self, size: int) -> int:
        """Allocate bytes on the card, aligned to `ALIGNMENT` and zeroed. Raises OutOfMemory."""
        self.use()
        status, pointer = self._cuda.cudaMalloc(size)
        if int(status) == _OUT_OF_MEMORY:
            self._cuda.cudaGetLastError()  # otherwise TensorRT would find the error and take it for its own
            raise OutOfMemory
        self._check(f"give {size} bytes", status)
        self._memory.append(int(pointer))
        self._ask("clear memory", "cudaMemsetAsync", pointer, 0, size, self._stream)
        return int(pointer)

    def pinned(self, shape: Sequence[int], dtype: Any) -> Pinned:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        pointer = int(self._ask(f"pin {size} bytes of host memory", "cudaMallocHost", size))
        self._host.append(pointer)
        return Pinned(pointer, shape, dtype)

    # work -------------------------------------------------------------------------------------------------------------
    def upload(self, target: int, source: int, size: int) -> None:
        """Copy bytes from pinned host memory to the card."""
        self._ask("copy to the card", "cudaMemcpyAsync", target, source, size, self._up, self._stream)

    def download(self, target: int, source: int, size: int) -> None:
        """Copy bytes from the card to pinned host memory."""
        self._ask("copy from the card", "cudaMemcpyAsync", target, source, size, self._down, self._stream)

    def copy_rows(self, target: int, source: int, pitch: int, width: int, rows: int) -> None:
        """Copy the first `width` bytes of each row of `pitch` bytes within the card."""
        self._rows(self._across, target, pitch, source, pitch, width, rows)

    def upload_rows(self, target: int, pitch: int, source: Array) -> None:
        """Copy a contiguous array [rows, …] to the starts of rows of `pitch` bytes, and wait for it."""
        width = source.nbytes // len(source)
        self._rows(self._up, target, pitch, source.ctypes.data, width, width, len(source))
        self.wait()

    def download_rows(self, target: Array, source: int, pitch: int) -> None:
        """The inverse of `upload_rows`."""
        width = target.nbytes // len(target)
        self._rows(self._down, target.ctypes.data, width, source, pitch, width, len(target))
        self.wait()

    def _rows(
        self, kind: Any, target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int
    ) -> None:
        if width:
            self._ask("copy", "cudaMemcpy2DAsync", target, target_pitch, source, source_pitch, width, rows, kind,
                      self._stream)  # fmt: skip

    def clear_rows(self, target: int, pitch: int, width: int, rows: int) -> None:
        """Zero the first `width` bytes of each row of `pitch` bytes."""
        if width:
            self._ask("clear memory", "cudaMemset2DAsync", target, pitch, 0, width, rows, self._stream)

    def wait(self) -> None:
        """Wait until all queued work is done. Raises EngineError if any of it failed."""
        self._ask("finish its work", "cudaStreamSynchronize", self._stream)

    def close(self) -> None:
        """Release all memory and the stream. Closing twice does nothing."""
        if self._stream is None:
            return
        self._cuda.cudaSetDevice(self._number)  # not `use`: an error here would hide the earlier one
        for pointer in self._memory:
            self._cuda.cudaFree(pointer)
        for pointer in self._host:
            self._cuda.cudaFreeHost(pointer)
        self._cuda.cudaStreamDestroy(self._stream)
        self._memory, self._host, self._stream = [], [], None

    # calls ------------------------------------------------------------------------------------------------------------
    def _ask(self, what: str, function: str, *arguments: Any) -> Any:
        """Call a CUDA function; returns its results without the status."""
        self.use()
        status, *values = getattr(self._cuda, function)(*arguments)
        self._check(what, status)
        return values[0] if len(values) == 1 else values

    def _check(self, what: str, status: Any) -> None:
        if int(status):
            raise EngineError(
                f"{self.name} cannot {what}: {self._describe(status)}", "Check that nvidia-smi works, and load it again"
            )

    def _describe(self, status: Any) -> str:
        _, text = self._cuda.cudaGetErrorString(status)
        return f"{text.decode() if text else 'an error'} (CUDA {int(status)})"


def _runtime() -> Any:
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except (ImportError, OSError) as e:
        raise MissingExtra(f"The package cuda-bindings cannot be imported: {e}", "tensorrt") from e


def aligned(size: int) -> int:
    """Bytes, rounded up to `ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT
