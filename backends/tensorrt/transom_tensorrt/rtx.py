"""Runs the network on a card with TensorRT: an engine, one execution context for each way of running, and the caches.

In a step only token ids go to the card and only logits come back. A context reads and writes a cache at the same
address, that of the first slot of the run. Both contexts share one block of activation memory, since they never run at
the same time.
"""

from __future__ import annotations

import contextlib
import traceback
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from transom.errors import DoesNotFit, EngineError, option
from transom_tensorrt.cuda import CudaCard, OutOfMemory, aligned
from transom_tensorrt.executing import WAYS, Array, Way, profile_of, rows_of, stored
from transom_tensorrt.kernel_cache import KernelCache
from transom_tensorrt.network import ALIGNMENT, QUERY, KeptTensor, Network

SHARE = 0.9
"""Share of the memory still free after loading that slots may take. The rest is for kernels that are compiled later,
for captured graphs and for other programs."""
READ_BYTES = 64 << 20
"""Largest part of an engine's file that is in host memory at once."""
LAST_MESSAGES = 8
"""Messages from TensorRT that an error quotes."""
WARM_RUNS = 3
"""The first run sets things up, the second is captured, the third is the first replay."""
MORE_PLACES = 126
"""Places for queries beyond the number of tokens: see `Network.queries`."""
DAMAGED = "Remove it with: transom cache clear"
_WRONG = {
    "VERSION_MISMATCH": ("it was built by another version of TensorRT", DAMAGED),
    "UNSUPPORTED_CC": ("it was built for another kind of card", DAMAGED),
    "OLD_CUDA_DRIVER": ("the driver is too old", "Install a newer driver"),
    "OLD_CUDA_RUNTIME": ("the CUDA runtime is too old", "pip install -U 'transom[tensorrt]'"),
    "INSUFFICIENT_GPU_MEMORY": ("the card has too little memory", "Use a card with more memory, or smaller weights"),
    "MALFORMED_ENGINE": ("the file is damaged", DAMAGED),
    "CUDA_ERROR": ("CUDA does not work", "Check that nvidia-smi works"),
}
"""Reason and fix for each diagnostic of `get_engine_validity`, by TensorRT's names."""


class ErrorLog:
    """The last error messages from TensorRT, whose threads may log at any time."""

    def __init__(self, trt: Any) -> None:
        last: deque[str] = deque(maxlen=LAST_MESSAGES)
        bad = (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR)

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity in bad and message.strip():
                    last.append(message.strip().splitlines()[0][:300])

        self._last = last
        self.logger = Logger()

    def error(self, what: str, fix: str) -> EngineError:
        """An error with the messages logged since the previous one."""
        logged = tuple(self._last)
        self._last.clear()
        return EngineError(f"TensorRT cannot {what}" + (f": {logged[-1]}" if logged else ""), fix, logged[:-1])


class RtxExecutor:
    """A `NetworkExecutor` on a card.

    Args:
        trt: the module `tensorrt_rtx`, or `tensorrt`.
        plan: the engine's file.
        kernels: the cache of compiled kernels.

    Raises:
        EngineError: TensorRT does not open the engine, or the engine does not match the network.
        DoesNotFit: the card has no memory for weights or activations.
    """

    def __init__(self, network: Network, plan: Path, trt: Any, card: CudaCard, kernels: KernelCache) -> None:
        self._network, self._trt, self._card, self._kernels = network, trt, card, kernels
        self._errors = ErrorLog(trt)
        self._contexts: dict[Way, Any] = {}
        self._bound: dict[Way, tuple[int, ...]] = {}
        self._caches: dict[str, int] = {}
        self._closed = False
        try:
            self.weight_bytes = plan.stat().st_size
        except OSError as e:
            raise EngineError(f"This compiled model is damaged: {e}", DAMAGED) from e
        card.use()
        if self.weight_bytes > card.free_bytes():
            raise self._too_large(self.weight_bytes, "Its weights take")
        try:
            self._runtime = trt.Runtime(self._errors.logger)
        except TypeError as e:  # raised by its bindings when no runtime can be created
            raise self._errors.error(f"start on {card.name}", "Check that nvidia-smi works") from e
        try:
            self._open(plan)
        except BaseException as e:
            # A stored error keeps its frames alive, and through them this executor and its contexts with their memory.
            traceback.clear_frames(e.__traceback__)
            self._release()
            raise

    def _open(self, plan: Path) -> None:
        _check_header(self._runtime, self._trt, plan)
        with plan.open("rb") as file:
            self._engine = self._runtime.deserialize_cuda_engine(_reader(self._trt, file))
        if self._engine is None:
            raise self._errors.error(f"open the engine of this model on {self._card.name}", DAMAGED)
        self._check_names()
        try:
            self._buffers()
        except OutOfMemory as e:
            size = self._activation_bytes() + 4 * self._most_rows() * self._network.vocabulary
            raise self._too_large(size, "In addition to its weights, activations and logits take") from e
        for index, way in enumerate(WAYS):
            self._contexts[way] = self._context(index)

    def _too_large(self, size: int, what: str) -> DoesNotFit:
        return DoesNotFit(
            f"{what} {_size(size)}, and {self._card.name} has {_size(self._card.free_bytes())} free",
            "Use a card with more memory, or a checkpoint with smaller weights",
        )

    def _check_names(self) -> None:
        """Raises EngineError if the engine does not match the network."""
        names = {self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)}
        kept = {name for k in self._network.kept for name in (k.input, k.output)}
        if names != {"input_ids", "past", "rows", "logits", *kept, *self._queries()}:
            raise EngineError("The engine of this compiled model has other inputs than its network", DAMAGED)
        if self._engine.num_optimization_profiles != len(WAYS):
            raise EngineError("The engine of this compiled model takes other shapes than its network", DAMAGED)
        if any(k.nbytes % ALIGNMENT for k in self._network.kept):  # `compiling` refuses such networks
            raise EngineError("The caches of this compiled model are not aligned as TensorRT requires", DAMAGED)

    def _queries(self) -> list[str]:
        return [f"{QUERY}.{i}" for i in range(len(self._network.queries))]

    def _activation_bytes(self) -> int:
        return max(int(self._engine.get_device_memory_size_for_profile_v2(i)) for i in range(len(WAYS)))

    def _most_rows(self) -> int:
        return max(profile_of(self._network, way).rows[2] for way in WAYS)

    def _buffers(self) -> None:
        """Allocate buffers at fixed addresses, so that TensorRT's captured graphs stay valid."""
        profiles = [profile_of(self._network, way) for way in WAYS]
        sizes = {
            "input_ids": max(p.batch[2] * p.tokens[2] for p in profiles),
            "past": max(p.batch[2] for p in profiles),
            "rows": self._most_rows(),
        }
        starts, at = {}, 0
        for name, count in sizes.items():
            starts[name] = at
            at += aligned(8 * count) // 8
        self._given = self._card.pinned((at,), np.int64)
        self._given.array[:] = 0
        self._logits = self._card.pinned((self._most_rows(), self._network.vocabulary), np.float32)
        self._starts = starts
        self._inputs = self._card.allocate(self._given.array.nbytes)
        self._outputs = self._card.allocate(self._logits.array.nbytes)
        tokens = max(p.batch[2] * p.tokens[2] for p in profiles) + MORE_PLACES
        widest = max(self._network.queries, default=0) * (4 if self._network.number == "float32" else 2)
        self._spare = self._card.allocate(max(1, tokens * widest))
        self._activations = self._activation_bytes()
        self._scratch = self._card.allocate(max(1, self._activations))

    def _context(self, profile: int) -> Any:
        trt = self._trt
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if hasattr(config, "create_runtime_cache"):  # TensorRT-RTX, which compiles for the card and its shapes here
            self._kernels.attach(config)
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            # A prompt of a new length must not wait for its kernels: until they are compiled it uses generic ones.
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.LAZY
        context = self._engine.create_execution_context(config)
        if context is None:
            raise self._errors.error(f"prepare the engine of this model on {self._card.name}", DAMAGED)
        if not context.set_optimization_profile_async(profile, self._card.stream):
            raise self._errors.error("use the shapes that the engine was built for", DAMAGED)
        self._card.wait()
        context.set_device_memory(self._scratch, self._activations)
        for name, start in self._starts.items():
            context.set_tensor_address(name, self._inputs + 8 * start)
        context.set_tensor_address("logits", self._outputs)
        for name in self._queries():
            context.set_tensor_address(name, self._spare)
        return context

    # slots ------------------------------------------------------------------------------------------------------------
    def allocate(self, most: int) -> int:
        left = int(self._card.free_bytes() * SHARE)
        slots = min(most, left // self._network.slot_bytes)
        while slots:
            try:
                base = self._card.allocate(sum(aligned(slots * kept.nbytes) for kept in self._network.kept))
            except OutOfMemory:  # another program took it, or it is fragmented
                slots = slots * 3 // 4
                continue
            for kept in self._network.kept:
                self._caches[kept.input] = base
                base += aligned(slots * kept.nbytes)
            return slots
        network = self._network
        fitting = min(network.context * left // network.slot_bytes, network.context // 2)
        raise DoesNotFit(
            f"A cache of {network.context} tokens takes {_size(network.slot_bytes)} on {self._card.name}, and "
            f"{_size(left)} are left after weights and activations",
            f"Load it with {option('context', fitting)} or less" if fitting else "Use a card with more memory",
        )

    def _place(self, kept: KeptTensor, slot: int, positions: int = 0) -> tuple[int, int, int]:
        """A slot's part of a kept tensor: its address, the bytes of a head, and how many of these the first `positions`
        take."""
        heads, rows, _ = kept.shape
        head = kept.nbytes // heads
        needed = rows_of(self._network, kept, positions) * (head // rows)
        return self._caches[kept.input] + slot * kept.nbytes, head, needed

    def copy_slot(self, source: int, target: int, positions: int) -> None:
        for kept in self._network.kept:
            at, head, needed = self._place(kept, source, positions)
            self._card.copy_rows(self._place(kept, target)[0], at, head, needed, kept.shape[0])

    def clear_slot(self, slot: int, start: int) -> None:
        for kept in self._network.kept:
            at, head, needed = self._place(kept, slot, start)
            self._card.clear_rows(at + needed, head, head - needed, kept.shape[0])

    def read_slot(self, slot: int, positions: int) -> Mapping[str, Array]:
        found: dict[str, Array] = {}
        for kept in self._network.kept:
            at, head, _ = self._place(kept, slot)
            shape = kept.shape[0], rows_of(self._network, kept, positions), kept.shape[2]
            found[kept.input] = np.empty(shape, stored(kept))
            self._card.download_rows(found[kept.input], at, head)
        return found

    def write_slot(self, slot: int, arrays: Mapping[str, Array]) -> None:
        for kept in self._network.kept:
            at, head, _ = self._place(kept, slot)
            self._card.upload_rows(at, head, np.ascontiguousarray(arrays[kept.input]))

    # runs -------------------------------------------------------------------------------------------------------------
    def run(self, way: Way, ids: Array, past: Array, rows: Array, first: int) -> Array:
        context, card = self._contexts[way], self._card
        card.use()
        for name, array in (("input_ids", ids), ("past", past), ("rows", rows)):
            start = self._starts[name]
            self._given.array[start : start + array.size] = array.reshape(-1)
        self._bind(way, context, (*ids.shape, len(rows), first))
        card.upload(self._inputs, self._given.pointer, self._given.array.nbytes)
        if not context.execute_async_v3(card.stream):
            raise self._errors.error("run a step", "Check that nvidia-smi works, and load it again")
        card.download(self._logits.pointer, self._outputs, 4 * len(rows) * self._network.vocabulary)
        card.wait()
        return self._logits.array[: len(rows)]

    def _bind(self, way: Way, context: Any, shape: tuple[int, int, int, int]) -> None:
        """Set the shapes and addresses that changed since the last run: a deep model has hundreds.

        Args:
            shape: slots, tokens of each, rows, and the first slot.
        """
        count, tokens, rows, first = shape
        before = self._bound.pop(way, (-1, -1, -1, -1))  # stored again once everything is bound
        done = True
        if shape[:3] != before[:3]:
            for name, size in (("input_ids", (count, tokens)), ("past", (count,)), ("rows", (rows,))):
                done &= context.set_input_shape(name, size)
        for kept in self._network.kept:
            if count != before[0]:
                done &= context.set_input_shape(kept.input, (count, *kept.shape))
            if first != before[3]:
                at = self._place(kept, first)[0]
                done &= context.set_tensor_address(kept.input, at) and context.set_tensor_address(kept.output, at)
        if not done:
            raise self._errors.error(f"take a step of {count} x {tokens} tokens", DAMAGED)
        self._bound[way] = shape

    def warm_up(self) -> None:
        """Compile kernels that are not cached, and capture a step of one token."""
        zero = np.zeros(1, np.int64)
        tokens = profile_of(self._network, "prefill").tokens[1]
        self.run("prefill", np.zeros((1, tokens), np.int64), zero, zero, 0)
        for _ in range(WARM_RUNS):
            self.run("decode", zero[None], zero, zero, 0)
        self.clear_slot(0, 0)
        self._kernels.save()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(EngineError):  # a card that does not respond is released anyway
            self._card.use()
        try:
            self._kernels.save()
        finally:
            self._release()
            self._card.close()

    def _release(self) -> None:
        """Release TensorRT's objects: contexts before the engine, the kernels, and the memory and stream from
        `CudaCard`; the engine before the runtime."""
        self._contexts.clear()
        self._kernels.close()
        self._engine = self._runtime = None


def _check_header(runtime: Any, trt: Any, plan: Path) -> None:
    """Check an engine's header before it is opened.

    Raises:
        EngineError: TensorRT would not open it; the reason is included.
    """
    if not hasattr(runtime, "get_engine_validity"):  # classic TensorRT
        return
    with plan.open("rb") as file:
        header = file.read(int(runtime.engine_header_size))
    validity, found = runtime.get_engine_validity(header)
    if validity != trt.EngineValidity.INVALID:
        return
    kinds = trt.EngineInvalidityDiagnostics.__members__
    wrong = [_WRONG[name] for name, kind in kinds.items() if name in _WRONG and int(found) & int(kind.value)]
    reason, fix = wrong[0] if wrong else ("it gives no reason", DAMAGED)
    raise EngineError(f"TensorRT {trt.__version__} does not open the engine of this model: {reason}", fix)


def _reader(trt: Any, file: Any) -> Any:
    """Gives TensorRT the file in parts, so that it is never in host memory as a whole."""

    class Reader(trt.IStreamReaderV2):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamReaderV2.__init__(self)

        def read(self, size: int, stream: int) -> bytes:
            data: bytes = file.read(min(size, READ_BYTES))
            return data

        def seek(self, offset: int, where: Any) -> bool:
            from_end = where == trt.SeekPosition.END
            # TensorRT's documentation disagrees with itself on the sign of an offset from the end.
            file.seek(-abs(offset) if from_end else offset, 2 if from_end else int(where == trt.SeekPosition.CUR))
            return True

    return Reader()


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
