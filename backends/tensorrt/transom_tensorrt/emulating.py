"""Runs the network in ONNX Runtime on the CPU: the same ONNX model that the engine is built from, for tests and for
machines without a card. Graph optimization is off, so that each operator computes exactly what it specifies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from transom.errors import EngineError
from transom_tensorrt.executing import Array, Way, rows_of, stored
from transom_tensorrt.network import Network

SLOTS = 8
"""Sequences that fit: enough for tests and the conformance kit."""
_ELEMENTS = {"float32": 1, "float16": 10}
"""ONNX's codes for element types."""
_INT64 = 7


class OnnxExecutor:
    """A `NetworkExecutor` on the CPU.

    Args:
        model: the ONNX file; its weights are in a file beside it.
        threads: processor threads to use; 0: ONNX Runtime's default.
        slots: largest number of slots.

    Raises:
        EngineError: ONNX Runtime does not open the model.
    """

    def __init__(self, network: Network, model: Path, threads: int = 0, slots: int = SLOTS) -> None:
        import onnxruntime

        self._network, self._slots = network, slots
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        settings.intra_op_num_threads = threads
        try:
            self._session: Any = onnxruntime.InferenceSession(str(model), settings, providers=["CPUExecutionProvider"])
        except Exception as e:  # ONNX Runtime's exceptions have no common base
            raise EngineError(
                f"ONNX Runtime cannot open {model.name}: {_first_line(e)}", "Remove it with: transom cache clear"
            ) from e
        self.weight_bytes = sum(path.stat().st_size for path in model.parent.glob(f"{model.stem}.*"))
        self._caches: dict[str, Array] = {}

    def allocate(self, most: int) -> int:
        slots = min(most, self._slots)
        self._caches = {kept.input: np.zeros((slots, *kept.shape), stored(kept)) for kept in self._network.kept}
        return slots

    def run(self, way: Way, ids: Array, past: Array, rows: Array, first: int) -> Array:
        logits = np.empty((len(rows), self._network.vocabulary), np.float32)
        binding = self._session.io_binding()
        inputs = {"input_ids": ids, "past": past, "rows": rows}
        arrays = {name: np.ascontiguousarray(array, np.int64) for name, array in inputs.items()}
        for name, array in arrays.items():
            binding.bind_input(name, "cpu", 0, _INT64, array.shape, array.ctypes.data)
        binding.bind_output("logits", "cpu", 0, _ELEMENTS["float32"], logits.shape, logits.ctypes.data)
        for kept in self._network.kept:  # read and written in place, as on a card
            part = self._caches[kept.input][first : first + len(ids)]
            place = "cpu", 0, _ELEMENTS[kept.number], part.shape, part.ctypes.data
            binding.bind_input(kept.input, *place)
            binding.bind_output(kept.output, *place)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as e:  # as above
            raise EngineError(f"ONNX Runtime cannot run the network: {_first_line(e)}", "Load the model again") from e
        return logits

    def copy_slot(self, source: int, target: int, positions: int) -> None:
        for cache, rows in self._rows(positions):
            cache[target, :, :rows] = cache[source, :, :rows]

    def clear_slot(self, slot: int, start: int) -> None:
        for cache, rows in self._rows(start):
            cache[slot, :, rows:] = 0

    def read_slot(self, slot: int, positions: int) -> Mapping[str, Array]:
        names = [kept.input for kept in self._network.kept]
        return {n: cache[slot, :, :rows].copy() for n, (cache, rows) in zip(names, self._rows(positions), strict=True)}

    def write_slot(self, slot: int, arrays: Mapping[str, Array]) -> None:
        for name, cache in self._caches.items():
            cache[slot, :, : arrays[name].shape[1]] = arrays[name]

    def _rows(self, positions: int) -> list[tuple[Array, int]]:
        """Each kept tensor with the number of rows that its first positions take."""
        return [(self._caches[kept.input], rows_of(self._network, kept, positions)) for kept in self._network.kept]

    def warm_up(self) -> None:
        """Nothing to do on the CPU."""

    def close(self) -> None:
        self._session, self._caches = None, {}


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
