"""Runs the compiled stages of an artifact, arrays in and arrays out. The only module that runs OpenVINO."""

from __future__ import annotations

import contextlib
import mmap
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from transom.errors import EngineError, message_lines
from transom.signature import Decoder
from transom_openvino_cpu import names
from transom_openvino_cpu.interrupts import held
from transom_openvino_cpu.plan import EnginePlan, StagePlan
from transom_openvino_cpu.signal_stack import signal_stack_kept
from transom_openvino_cpu.thread_exits import wait_for_exits

Array = np.ndarray[Any, np.dtype[Any]]

HEAD_ROWS = 128
"""Rows of logits computed at once."""


def openvino() -> Any:
    """The package, imported without its unused converter, which would add 55 ms to a cold start."""
    if (loaded := sys.modules.get("openvino")) is not None and hasattr(loaded, "Core"):
        return loaded
    with held():
        sys.modules.setdefault("openvino.tools.ovc", None)  # type: ignore[arg-type]
        import openvino
    return openvino


class _Stage:
    """One compiled stage and its request. Input tensors stay set until they change."""

    def __init__(self, core: Any, plan: StagePlan, path: Path, config: Mapping[str, str]) -> None:
        ov = openvino()
        self.plan = plan
        with path.open("rb") as f:
            # A private mapping: the engine demands writable memory, and never writes to weights.
            self._map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
        blob = np.frombuffer(self._map, np.uint8)
        try:
            with held(), signal_stack_kept():
                self.compiled = core.import_model(ov.Tensor(blob, shared_memory=True), "CPU", {**plan.config, **config})
        except RuntimeError as e:
            raise EngineError(
                f"OpenVINO cannot open {path.name} of this compiled model: {message_lines(e)[-1]}",
                "Remove it with: transom cache clear",
            ) from e
        self.request = self.compiled.create_infer_request()
        self._alone = int(self.compiled.get_property("INFERENCE_NUM_THREADS")) == 1
        self.inputs = {port.node.friendly_name: i for i, port in enumerate(self.compiled.inputs)}
        self._held: dict[str, Any] = {}
        self._buffers: dict[str, Array] = {}

    def set(self, name: str, tensor: Any) -> None:
        """Set an input for all runs until it is set again; `tensor` is an `openvino.Tensor`."""
        self.request.set_input_tensor(self.inputs[name], tensor)
        self._held[name] = tensor  # the request does not keep the memory alive

    def put(self, name: str, array: Array, *, keep: bool) -> None:
        """Set an input for the next run. With `keep` the array is kept: later arrays of its shape are copied into it,
        which is several times faster than setting a tensor."""
        buffer = self._buffers.get(name)
        if buffer is not None and buffer.shape == array.shape:
            buffer[...] = array
            return
        self.set(name, openvino().Tensor(array, shared_memory=True))
        if keep:
            self._buffers[name] = array

    def infer(self) -> None:
        """Run the request; the outputs stay in its memory.

        With one thread, OpenVINO 2026.4 loses the error of a node whose input shapes do not fit if it computes on the
        thread that asks, and the outputs are those of the run before. On a thread of its own it reports it.

        Raises:
            RuntimeError: OpenVINO failed.
        """
        if self._alone:
            self.request.start_async(share_inputs=True)
            self.request.wait()
        else:
            self.request.infer(share_outputs=True)  # otherwise every output would be copied

    def port(self, name: str) -> Any:
        return self.compiled.inputs[self.inputs[name]]

    def drop_read_pages(self) -> None:
        """Release the file's memory pages: the engine has repacked the weights that it reads often."""
        if hasattr(self._map, "madvise"):
            with contextlib.suppress(OSError):
                self._map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        self._held.clear()
        with signal_stack_kept():
            del self.request, self.compiled
        # The file is unmapped with the last view of it.


class OpenVinoEngine:
    """All stages of an artifact.

    Args:
        files: the artifact's files by name.
        threads: processor threads to use; 0: the engine chooses.
    """

    def __init__(self, plan: EnginePlan, files: Mapping[str, Path], threads: int) -> None:
        from transom_openvino_cpu.attention import Heads, reader

        ov = openvino()
        self.plan = plan
        core = ov.Core()
        if plan.paged and plan.decoder is not None:
            layers = [Heads(c.q_heads, c.kv_heads, c.head_dim, c.value_dim) for c in plan.decoder.layers]
            core.add_extension(reader(layers))
        config = {"INFERENCE_NUM_THREADS": str(threads)} if threads else {}
        self._core = core
        self._threads: set[int] = set()
        self._stages = [_Stage(core, stage, files[stage.file], config) for stage in plan.stages]
        self._body = next(s for s in self._stages if s.plan.name == "body")
        if plan.paged and plan.decoder is not None:
            self._check_layers(plan.decoder)

    def _check_layers(self, decoder: Decoder) -> None:
        """Check the caches against the shapes of the layers, in case the reader assigned layers in the wrong order."""
        for i, layer in enumerate(decoder.layers):
            for name, dim in zip(names.cache_inputs(i), (layer.head_dim, layer.value_dim), strict=True):
                shape = [d.get_length() for d in list(self._body.port(name).get_partial_shape())[1:]]
                if shape != [layer.kv_heads, names.PAGE_TOKENS, dim]:
                    raise EngineError(
                        f"OpenVINO expects pages of {shape} for {name}, not {[layer.kv_heads, names.PAGE_TOKENS, dim]}",
                        "Remove it with: transom cache clear",
                    )

    def cache_element_bytes(self) -> int:
        """Bytes of one element of the cache."""
        return int(self._body.port(names.cache_inputs(0)[0]).get_element_type().size)

    def bind_caches(self, caches: Mapping[str, Array]) -> None:
        """Set the page arrays once, [pages, kv_heads, page_tokens, dim] of `cache_element_bytes` bytes each."""
        ov = openvino()
        for name, array in caches.items():
            port = self._body.port(name)
            self._body.set(name, ov.Tensor(array, ov.Shape(list(array.shape)), port.get_element_type()))

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str], *, keep: bool) -> dict[str, Array]:
        """Run the stages in order. The returned arrays belong to the caller.

        Args:
            outputs: names of the outputs to return.
            keep: the engine may keep the input arrays; the caller does not use them again.

        Raises:
            EngineError: the engine failed; the message quotes it.
        """
        values: dict[str, Any] = {}
        results: dict[str, Array] = {}
        self._threads.add(threading.get_native_id())
        for stage in self._stages:
            if stage.plan.name == "head":
                hidden = self._rows(stage, values)
                if hidden is not None:
                    results |= self._run_head(stage, hidden, outputs)
                    continue
            self._infer(stage, values, inputs, keep=keep)
            for i, name in enumerate(stage.plan.outputs):
                values[name] = stage.request.get_output_tensor(i)
                if name in outputs:
                    results[name] = np.array(values[name].data)
        return results

    def _infer(self, stage: _Stage, values: Mapping[str, Any], inputs: Mapping[str, Array], *, keep: bool) -> None:
        try:
            for name in stage.inputs:
                if name in values:
                    stage.set(name, values[name])
                elif name in inputs:
                    stage.put(name, inputs[name], keep=keep)
            stage.infer()
        except RuntimeError as e:
            raise EngineError(
                f"OpenVINO failed while running the stage {stage.plan.name}: {message_lines(e)[-1]}"
            ) from e

    @staticmethod
    def _rows(stage: _Stage, values: Mapping[str, Any]) -> tuple[str, Array] | None:
        """The single input of the head, if it has too many rows for one run."""
        if len(stage.inputs) != 1 or len(stage.plan.outputs) != 1:
            return None
        (name,) = stage.inputs
        if name not in values or values[name].shape[0] <= HEAD_ROWS:
            return None
        return name, values[name].data

    def _run_head(self, stage: _Stage, hidden: tuple[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        """Run the head on `HEAD_ROWS` rows at a time, and join the results."""
        name, rows = hidden
        (output,) = stage.plan.outputs
        result: Array | None = None
        for start in range(0, len(rows), HEAD_ROWS):
            self._infer(stage, {}, {name: np.array(rows[start : start + HEAD_ROWS])}, keep=False)
            part = stage.request.get_output_tensor(0).data
            if result is None:
                result = np.empty((len(rows), *part.shape[1:]), part.dtype)
            result[start : start + len(part)] = part
        return {output: result} if result is not None and output in outputs else {}

    def drop_read_pages(self) -> None:
        for stage in self._stages:
            stage.drop_read_pages()

    def close(self) -> None:
        wait_for_exits(self._threads)
        for stage in self._stages:
            stage.close()
        self._stages = []
