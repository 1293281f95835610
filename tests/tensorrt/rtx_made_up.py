"""A card and a TensorRT that are made up: memory of the card is memory of this process, and an engine's file is an ONNX
model, which is computed where its tensors were bound. Both note what they are asked for."""

from __future__ import annotations

import ctypes
import enum
import json
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

from transom.contract import Device

CARD = Device(
    "cuda", "cuda:0", "sm_89", 24 << 30, identity="pci:0000:65:00.0 RTX 4090", name="RTX 4090",
    drivers={"nvidia": "580.65", "cuda": "13.0"},
)  # fmt: skip

OTHER = replace(CARD, id="cuda:1", identity="pci:0000:b3:00.0 RTX 4090")
"""One of the same kind beside it."""
NUMBERS = {b"0000:65:00.0": 3, b"0000:b3:00.0": 4}
"""CUDA's, by address."""


class Status(enum.IntEnum):
    SUCCESS = 0
    OUT_OF_MEMORY = 2
    LAUNCH_FAILED = 719


class Cuda:
    """`cuda.bindings.runtime`.

    Args:
        memory: bytes of the card.
        failing: status by the function's name.
    """

    cudaMemcpyKind = SimpleNamespace(
        cudaMemcpyHostToDevice="up", cudaMemcpyDeviceToHost="down", cudaMemcpyDeviceToDevice="across"
    )

    def __init__(self, memory: int = 1 << 30, **failing: Status) -> None:
        self.memory, self.failing = memory, failing
        self.calls: list[tuple[Any, ...]] = []
        self.blocks: dict[int, Any] = {}
        self.placed: dict[int, int] = {}
        """The card's number by the block's address."""
        self.last = 0
        """What `cudaGetLastError` would give."""
        self._threads = threading.local()

    @property
    def current(self) -> int:
        """The card of the calling thread."""
        return getattr(self._threads, "current", 0)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cuda"):
            raise AttributeError(name)

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            if name in self.failing:
                self.last = int(self.failing[name])
                return (self.failing[name], None)
            given = getattr(self, f"_{name}", lambda *_: ())(*arguments)
            return given if given and isinstance(given[0], Status) else (Status.SUCCESS, *given)

        return call

    def named(self, *names: str) -> list[tuple[Any, ...]]:
        return [call for call in self.calls if call[0] in names]

    def _cudaDeviceGetByPCIBusId(self, address: bytes) -> tuple[Any, ...]:
        return (NUMBERS[address],) if address in NUMBERS else (Status.LAUNCH_FAILED, None)

    def _cudaSetDevice(self, number: int) -> tuple[Any, ...]:
        self._threads.current = number
        return ()

    def _cudaGetErrorString(self, status: Status) -> tuple[Any, ...]:
        return (status.name.lower().replace("_", " ").encode(),)

    def _cudaGetLastError(self) -> tuple[Any, ...]:
        self.last = 0
        return ()

    def _cudaMemGetInfo(self) -> tuple[Any, ...]:
        used = sum(size for block, size in self.blocks.values() if block is not None)
        return self.memory - used, self.memory

    def _cudaMalloc(self, size: int) -> tuple[Any, ...]:
        if size > self._cudaMemGetInfo()[0]:
            self.last = 2
            return Status.OUT_OF_MEMORY, None
        return (self._block(size),)

    def _block(self, size: int) -> int:
        block = np.full(size + 256, 0xFF, np.uint8)  # NaN, if read as numbers
        address = -(-block.ctypes.data // 256) * 256
        self.blocks[address] = (block, size)
        self.placed[address] = self.current
        return int(address)

    def _cudaMallocHost(self, size: int) -> tuple[Any, ...]:
        self.host = [*getattr(self, "host", []), np.zeros(size, np.uint8)]
        return (int(self.host[-1].ctypes.data),)

    def _cudaFree(self, pointer: int) -> tuple[Any, ...]:
        del self.blocks[pointer]
        return ()

    def _cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        return (77,)

    def _cudaMemcpyAsync(self, target: int, source: int, size: int, kind: str, stream: int) -> tuple[Any, ...]:
        ctypes.memmove(target, source, size)
        return ()

    def _cudaMemcpy2DAsync(
        self, target: int, to: int, source: int, by: int, width: int, rows: int, kind: str, stream: int
    ) -> tuple[Any, ...]:
        for row in range(rows):
            ctypes.memmove(target + row * to, source + row * by, width)
        return ()

    def _cudaMemsetAsync(self, target: int, value: int, size: int, stream: int) -> tuple[Any, ...]:
        ctypes.memset(target, value, size)
        return ()

    def _cudaMemset2DAsync(
        self, target: int, pitch: int, value: int, width: int, rows: int, stream: int
    ) -> tuple[Any, ...]:
        for row in range(rows):
            ctypes.memset(target + row * pitch, value, width)
        return ()


class _Severity(enum.IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2


class _Base:
    def __init__(self) -> None: ...


class _Logger(_Base):
    INTERNAL_ERROR, ERROR, WARNING = _Severity


class Validity(enum.Enum):
    VALID = 0
    SUBOPTIMAL = 1
    INVALID = 2


class Diagnostics(enum.Enum):
    VERSION_MISMATCH = 1
    OLD_CUDA_DRIVER = 4
    MALFORMED_ENGINE = 32


class Trt:
    """`tensorrt_rtx`; with `classic` what `tensorrt` has of it.

    Args:
        cuda: the card.
        activations: bytes that each profile needs.
        refusing: what gives nothing: "runtime", "deserialize", "context", "execute", "profile", "shape", "cache".
    """

    ILogger = _Logger
    IStreamReaderV2 = _Base
    SeekPosition = enum.Enum("SeekPosition", ["SET", "CUR", "END"])
    EngineValidity = Validity
    EngineInvalidityDiagnostics = Diagnostics
    ExecutionContextAllocationStrategy = enum.Enum("Allocation", ["STATIC", "USER_MANAGED"])
    CudaGraphStrategy = enum.Enum("CudaGraphStrategy", ["DISABLED", "WHOLE_GRAPH_CAPTURE"])
    DynamicShapesKernelSpecializationStrategy = enum.Enum("Strategy", ["LAZY", "EAGER"])
    __version__ = "1.7.1.116"

    def __init__(
        self, cuda: Cuda, activations: tuple[int, int] = (5000, 3000), classic: bool = False, refusing: str = ""
    ) -> None:
        self.cuda, self.activations, self.classic, self.refusing = cuda, activations, classic, refusing
        self.validity: tuple[Validity, int] = (Validity.VALID, 0)
        self.calls: list[tuple[Any, ...]] = []
        self.contexts: list[_Context] = []
        self.engines: list[weakref.ref[_Engine]] = []
        self.kernels: set[str] = set()
        """Compiled in this process."""
        self.reads: list[int] = []
        self.logger: Any = None

    def Runtime(self, logger: Any) -> _Runtime:
        self.logger = logger
        if self.refusing == "runtime":
            self.say("CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        return (_ClassicRuntime if self.classic else _Runtime)(self)

    def say(self, *words: str) -> None:
        for word in words:
            self.logger.log(_Severity.ERROR, word)
        self.logger.log(_Severity.WARNING, "a warning, which is no reason")


class _ClassicRuntime:
    def __init__(self, trt: Trt) -> None:
        self.trt = trt

    def deserialize_cuda_engine(self, reader: Any) -> _Engine | None:
        data = b""
        while part := reader.read(100_000_000, 0):
            data += part
            self.trt.reads.append(len(part))
        assert reader.seek(4, self.trt.SeekPosition.SET)
        assert reader.read(3, 0) == data[4:7]
        assert reader.seek(-2, self.trt.SeekPosition.CUR)
        assert reader.read(2, 0) == data[5:7]
        for sign in (1, -1):
            assert reader.seek(5 * sign, self.trt.SeekPosition.END)
            assert reader.read(9, 0) == data[-5:]
        if self.trt.refusing == "deserialize":
            self.trt.say("first this", "then that")
            return None
        return _Engine(self.trt, Path(reader.read.__closure__[0].cell_contents.name))


class _Runtime(_ClassicRuntime):
    engine_header_size = 64

    def get_engine_validity(self, header: bytes) -> tuple[Validity, int]:
        assert len(header) == 64
        return self.trt.validity


class _Engine:
    num_optimization_profiles = 2

    def __init__(self, trt: Trt, model: Path) -> None:
        self.trt = trt
        trt.engines.append(weakref.ref(self))
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.session = onnxruntime.InferenceSession(str(model), settings, providers=["CPUExecutionProvider"])
        self.inputs = [i.name for i in self.session.get_inputs()]
        self.outputs = {o.name: o for o in self.session.get_outputs()}
        self.num_io_tensors = len(self.inputs) + len(self.outputs)

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    def get_device_memory_size_for_profile_v2(self, index: int) -> int:
        return self.trt.activations[index]

    def create_runtime_config(self) -> Any:
        return _ClassicConfig() if self.trt.classic else _Config(self.trt)

    def create_execution_context(self, config: Any) -> _Context | None:
        if self.trt.refusing == "context":
            self.trt.say("no context")
            return None
        context = _Context(self, config)
        self.trt.contexts.append(context)
        return context


class _ClassicConfig:
    _allocation: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self._allocation = strategy

    def get_execution_context_allocation_strategy(self) -> Any:
        return self._allocation


class _Config(_ClassicConfig):
    cuda_graph_strategy: Any = None
    dynamic_shapes_kernel_specialization_strategy: Any = None

    def __init__(self, trt: Trt) -> None:
        self.trt = trt
        self.cache: Any = None

    def create_runtime_cache(self) -> _Cache:
        return _Cache(self.trt)

    def set_runtime_cache(self, cache: _Cache) -> bool:
        self.cache = cache
        return True


class _Cache:
    """Of kernels that are only named."""

    def __init__(self, trt: Trt) -> None:
        self.trt = trt

    def deserialize(self, data: bytes) -> bool:
        try:
            self.trt.kernels |= set(json.loads(data))
        except ValueError:
            return False
        return True

    def serialize(self) -> bytes | None:
        if self.trt.refusing == "cache":
            return None
        return json.dumps(sorted(self.trt.kernels)).encode()


class _Context:
    def __init__(self, engine: _Engine, config: Any) -> None:
        self.engine, self.config, self.trt = engine, config, engine.trt
        self.profile = -1
        self.memory: tuple[int, int] | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.set: list[str] = []
        """Names in the order in which shapes and addresses were set."""

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert stream == 77
        self.profile = index
        return self.trt.refusing != "profile"

    def set_device_memory(self, pointer: int, size: int) -> None:
        assert pointer % 256 == 0
        self.memory = pointer, size

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(int(n) for n in shape)
        self.set.append(name)
        return self.trt.refusing != "shape"

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        assert pointer % 256 == 0, name
        self.addresses[name] = pointer
        self.set.append(name)
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 77
        assert self.trt.cuda.current == NUMBERS[b"0000:65:00.0"]
        assert self.memory is not None
        assert self.memory[1] >= self.trt.activations[self.profile]
        self.trt.calls.append(("execute", self.profile, dict(self.shapes), dict(self.addresses)))
        self.trt.cuda.calls.append(("execute", self.profile))
        if self.trt.refusing == "execute":
            self.trt.say("the card is on fire\nand more")
            return False
        self.trt.kernels.add(f"{self.profile} {self.shapes['input_ids']}")
        binding = self.engine.session.io_binding()
        kinds = {"tensor(int64)": 7, "tensor(float)": 1, "tensor(float16)": 10}
        for value in self.engine.session.get_inputs():
            shape, at = self.shapes[value.name], self.addresses[value.name]
            binding.bind_input(value.name, "cpu", 0, kinds[value.type], shape, at)
        (batch, tokens), (rows,) = self.shapes["input_ids"], self.shapes["rows"]
        sizes = {"batch": batch, "tokens": tokens, "rows": rows}
        for name, value in self.engine.outputs.items():
            assert name in self.addresses
            if name.startswith("query."):  # nobody reads them
                continue
            shape = tuple(sizes[n] if isinstance(n, str) else n for n in value.shape)
            binding.bind_output(name, "cpu", 0, kinds[value.type], shape, self.addresses[name])
        self.engine.session.run_with_iobinding(binding)
        return True
