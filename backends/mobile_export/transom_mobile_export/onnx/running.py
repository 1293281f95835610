"""Runs a decoder in ONNX Runtime on the CPU: one sequence at a time, with a cache that is updated in place.

This is the engine of a `transom.sessions.BufferedSession`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from transom.errors import EngineError, MissingExtra, message_lines
from transom.graph.weights import Array
from transom.sessions.buffered import Buffers
from transom.signature import Decoder
from transom_mobile_export.onnx.lowering import PAST, PRESENT

ELEMENTS: dict[str, tuple[int, np.dtype[Any]]] = {
    "tensor(float)": (1, np.dtype(np.float32)),
    "tensor(float16)": (10, np.dtype(np.float16)),
}
"""ONNX's codes for element types and NumPy's dtypes, by ONNX Runtime's names."""
_FLOAT, _INT64 = 1, 7
CHUNK = 512
"""Tokens that run at once unless all logits are wanted: the logits of a long prompt would fill the memory."""
GRAIN = 256
"""The capacity of a cache is a multiple of this many tokens."""
DAMAGED = "Remove it with: transom cache clear; or export the bundle again"


class Runner:
    """Runs a model.

    Args:
        model: the ONNX file; its weights are in a file beside it.
        threads: processor threads to use; 0: ONNX Runtime's default.

    Raises:
        EngineError: ONNX Runtime does not open the model.
        MissingExtra: ONNX Runtime is not installed.
    """

    def __init__(self, model: Path, decoder: Decoder, threads: int) -> None:
        try:
            import onnxruntime
        except ImportError as e:
            raise MissingExtra("This model needs the package onnxruntime, which is not installed", "onnx") from e
        self._decoder = decoder
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 4  # errors are raised as exceptions anyway
        settings.intra_op_num_threads = threads
        try:
            self._session: Any = onnxruntime.InferenceSession(str(model), settings, providers=["CPUExecutionProvider"])
            inputs = {value.name: value.type for value in self._session.get_inputs()}
            self._element, self.dtype = ELEMENTS[inputs[PAST.format(0, "key")]]
        except KeyError as e:
            raise EngineError(f"{model.name} was not written by this backend: it lacks {e}", DAMAGED) from e
        except Exception as e:  # ONNX Runtime's exceptions have no common base
            raise EngineError(f"ONNX Runtime cannot open {model.name}: {message_lines(e)[0]}", DAMAGED) from e

    def capacity(self, tokens: int) -> int:
        return -(-tokens // GRAIN) * GRAIN

    def new_buffers(self, capacity: int) -> dict[str, Array]:
        return {
            PAST.format(i, part): np.empty((1, layer.kv_heads, capacity, layer.head_dim), self.dtype)
            for i, layer in enumerate(self._decoder.layers)
            for part in ("key", "value")
        }

    def rows(self, name: str, tokens: int) -> int:
        return tokens

    def compute(self, tokens: Array, past: int, buffers: Buffers, *, every: bool) -> Array:
        """See `transom.sessions.BufferedEngine`.

        Raises:
            EngineError: ONNX Runtime failed.
        """
        rows: list[Array] = []
        for at in range(0, len(tokens), CHUNK):
            logits = self._run(tokens[at : at + CHUNK], past + at, buffers)
            rows = [*rows, logits] if every else [logits[-1:].copy()]
        return np.concatenate(rows) if len(rows) > 1 else rows[0]

    def _run(self, tokens: Array, past: int, buffers: Buffers) -> Array:
        """Append tokens to a cache, and return their logits, float32 [tokens, vocabulary]."""
        ids = np.ascontiguousarray(tokens, np.int64).reshape(1, -1)
        mask = np.ones((1, past + ids.size), np.int64)
        logits = np.empty((1, ids.size, self._decoder.vocabulary), np.float32)
        binding = self._session.io_binding()
        binding.bind_input("input_ids", "cpu", 0, _INT64, ids.shape, ids.ctypes.data)
        binding.bind_input("attention_mask", "cpu", 0, _INT64, mask.shape, mask.ctypes.data)
        binding.bind_output("logits", "cpu", 0, _FLOAT, logits.shape, logits.ctypes.data)
        for i in range(len(self._decoder.layers)):
            for part in ("key", "value"):
                buffer = buffers[PAST.format(i, part)]
                place = "cpu", 0, self._element, buffer.shape, buffer.ctypes.data
                binding.bind_input(PAST.format(i, part), *place)
                binding.bind_output(PRESENT.format(i, part), *place)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as e:  # as above
            raise EngineError(
                f"ONNX Runtime cannot run the decoder: {message_lines(e)[0]}", "Load the model again"
            ) from e
        found: Array = logits[0]
        return found

    def close(self) -> None:
        self._session = None
