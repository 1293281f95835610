"""Launches kernels: by Triton's interpreter, or machine code compiled ahead of time by the CUDA driver.

The CUDA Driver API (`cuLaunchKernel`) needs neither Triton on the card's machine nor the launcher that Triton would
first build there with a C compiler.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from transom.contract import Device
from transom.errors import EngineError
from transom_cuda_triton.variants import ALIGNMENT, STRIDES, Code, KernelVariant


def check_aligned(variant: KernelVariant, arguments: Mapping[str, Any]) -> None:
    """Check the pointers and strides that compiled code assumes to be multiples of 16.

    Raises:
        EngineError: one is not aligned; the kernel would access wrong addresses.
    """
    for name, kind in variant.types:
        value = arguments[name]
        if kind.startswith("*"):
            wrong = value.data_ptr() % ALIGNMENT
        else:
            wrong = name.endswith(STRIDES) and value % ALIGNMENT
        if wrong:
            raise EngineError(f"The argument {name} of {variant.kernel} is not aligned to {ALIGNMENT}", REPORT)


REPORT = "Report it, with the model's name and its sizes"


class InterpretingLauncher:
    """Runs kernels on the CPU by Triton's interpreter: slow, for tests."""

    lock = threading.Lock()
    """The interpreter patches Triton's modules while a kernel runs, so a process runs one kernel at a time."""

    def __call__(self, variant: KernelVariant, grid: tuple[int, ...], arguments: Mapping[str, Any]) -> None:
        if not all(grid):
            return
        check_aligned(variant, arguments)
        module, _, name = variant.kernel.partition(".")
        kernel = getattr(importlib.import_module(f"transom_cuda_triton.kernels.{module}"), name)
        given = {name: arguments[name] for name, _ in variant.types}
        with self.lock:
            kernel[grid](**given, **dict(variant.constants))


_KINDS: dict[str, Any] = {
    "u64": ctypes.c_uint64, "s64": ctypes.c_int64, "u32": ctypes.c_uint32, "s32": ctypes.c_int32,
    "f32": ctypes.c_float, "f64": ctypes.c_double, "u16": ctypes.c_uint16, "u8": ctypes.c_uint8,
}  # fmt: skip
_MAX_DYNAMIC_SHARED = 8
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES."""
_PLAIN_SHARED = 48 << 10
"""Bytes of shared memory that need not be enabled."""


class DriverLauncher:
    """Launches compiled variants, from any thread, in the CUDA context that is current at construction.

    Args:
        codes: by variant.
        library: the driver's library; None: the one of this system.
        stream: returns the stream for each launch.

    Raises:
        EngineError: there is no driver, or it rejects the code.
    """

    def __init__(self, codes: Mapping[KernelVariant, Code], stream: Any, library: Any = None) -> None:
        self._library = library if library is not None else _driver()
        self._codes, self._stream = codes, stream
        self._context, self._ready = ctypes.c_void_p(), threading.local()
        self._check(self._library.cuCtxGetCurrent(ctypes.byref(self._context)), "name the current context")
        self._functions: dict[KernelVariant, ctypes.c_void_p] = {}
        self._modules: list[ctypes.c_void_p] = []
        for variant, code in codes.items():
            self._functions[variant] = self._loaded(code)

    def _loaded(self, code: Code) -> ctypes.c_void_p:
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._check(self._library.cuModuleLoadData(ctypes.byref(module), code.cubin), f"load {code.entry}")
        self._modules.append(module)
        found = self._library.cuModuleGetFunction(ctypes.byref(function), module, code.entry.encode())
        self._check(found, f"find {code.entry}")
        if code.shared > _PLAIN_SHARED:
            set_ = self._library.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, code.shared)
            self._check(set_, f"give {code.shared} bytes of shared memory to {code.entry}")
        return function

    def __call__(self, variant: KernelVariant, grid: tuple[int, ...], arguments: Mapping[str, Any]) -> None:
        if not all(grid):  # a step without logits; CUDA rejects an empty grid
            return
        code = self._codes.get(variant)
        if code is None:
            raise EngineError(f"This compiled model lacks a variant of {variant.kernel}", "Load the model again")
        if not getattr(self._ready, "here", False):  # a new thread has no CUDA context yet
            self._check(self._library.cuCtxSetCurrent(self._context), "set its context")
            self._ready.here = True
        check_aligned(variant, arguments)
        values = packed(code, arguments)
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        x, y, z = (*grid, 1, 1)[:3]
        status = self._library.cuLaunchKernel(
            self._functions[variant], x, y, z, 32 * code.warps, 1, 1, code.shared, ctypes.c_void_p(self._stream()),
            pointers, None,
        )  # fmt: skip
        self._check(status, f"start {code.entry}")

    def _check(self, status: int, what: str) -> None:
        if status == 0:
            return
        text = ctypes.c_char_p()
        self._library.cuGetErrorString(status, ctypes.byref(text))
        reason = text.value.decode() if text.value else f"error {status}"
        raise EngineError(f"The CUDA driver cannot {what}: {reason}", "Check that nvidia-smi works")

    def close(self) -> None:
        for module in self._modules:
            self._library.cuModuleUnload(module)
        self._modules.clear()
        self._functions.clear()


def packed(code: Code, arguments: Mapping[str, Any]) -> list[Any]:
    """The arguments of a launch as C values, in parameter order."""
    values: list[Any] = []
    for name, kind in zip(code.arguments, code.parameters, strict=False):
        value = arguments[name]
        values.append(_KINDS[kind](value.data_ptr() if hasattr(value, "data_ptr") else value))
    values += [_KINDS[kind](0) for kind in code.parameters[len(code.arguments) :]]
    return values


def device_index(device: Device, library: Any = None) -> int:
    """CUDA's index of a card, found by the PCI address in its identity, since CUDA may use another order.

    Args:
        library: the driver's library; None: the one of this system.

    Raises:
        EngineError: there is no driver, or the card is hidden from this process.
    """
    library = library if library is not None else _driver()
    address = device.identity.removeprefix("pci:").split(" ")[0]
    number = ctypes.c_int()
    if library.cuInit(0) or library.cuDeviceGetByPCIBusId(ctypes.byref(number), address.encode()):
        raise EngineError(
            f"CUDA does not show {device.id} ({device.identity}) to this process",
            "Unset CUDA_VISIBLE_DEVICES, or set it to that card",
        )
    return number.value


def _driver() -> Any:
    names: Sequence[str] = ("nvcuda.dll",) if os.name == "nt" else ("libcuda.so.1", "libcuda.so")
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise EngineError("The NVIDIA driver's library libcuda is missing", "Install the driver; then try: nvidia-smi")
