"""Builds an engine from an ONNX file, with progress, for a card that need not be present.

What ONNX cannot express is set on the parsed network: how far each sequence's cache is filled, so that attention reads
no further, and the dtype of a softmax. A warning about an unused input is treated as an error: TensorRT gives no other
sign that it did not understand the input.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from transom.errors import EngineError
from transom.quantize.rounding import LARGEST_FLOAT8
from transom_tensorrt import inspecting
from transom_tensorrt.attention import Fused
from transom_tensorrt.network import LENGTHS, Network, Shape, ShapeProfile
from transom_tensorrt.sdk import Sdk, library

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transom.contract import Progress

LAST_MESSAGES = 8
"""Messages from TensorRT that an error quotes."""


@dataclass(frozen=True)
class BuildSpec:
    """What to build, beside the ONNX file."""

    network: Network
    inputs: Mapping[str, Shape]
    arch: int
    """89 for sm_89."""
    fused: tuple[Fused, ...] = ()
    """Attention nodes that TensorRT can fuse."""


@dataclass(frozen=True)
class BuildResult:
    """The result of a build."""

    layers: tuple[inspecting.EngineLayer, ...]
    memory: Mapping[str, int]
    """Bytes: `activations` and `weights` on the card as TensorRT reports them; `build`: peak memory of this process."""
    seconds: float


@dataclass
class _BuildLog:
    """Messages logged by TensorRT."""

    messages: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


def build(model: Path, plan: Path, spec: BuildSpec, sdk: Sdk, progress: Progress) -> BuildResult:
    """Build the engine of an ONNX file and write it to `plan`.

    Raises:
        EngineError: TensorRT refuses the network; its own messages are included.
        Cancelled: raised by `progress`.
    """
    trt = library(sdk.name)
    logged = _BuildLog()
    logger = _logger(trt, logged)
    start = time.perf_counter()
    try:
        builder = trt.Builder(logger)
    except TypeError as e:  # raised by pybind11 when a factory returns nothing
        raise _refused(sdk, "it cannot be started", logged) from e
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    progress("parse", None)
    if not parser.parse_from_file(str(model)):
        said = [str(parser.get_error(i)) for i in range(parser.num_errors)]
        raise _refused(sdk, f"it cannot read the network: {said[0] if said else 'no reason given'}", logged)
    kept_arrays = _attend(trt, network, spec)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.clear_flag(trt.BuilderFlag.TF32)
    if sdk.crosses:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{spec.arch}"), 0)
    for profile in (spec.network.prefill, spec.network.decode):
        config.add_optimization_profile(_profile(builder, profile, spec.inputs))
    monitor = _monitor(trt, progress)
    config.progress_monitor = monitor
    with plan.open("wb") as file:
        done = builder.build_serialized_network_to_stream(network, config, _writer(trt, file, monitor))
    if monitor.raised is not None:
        raise monitor.raised
    if not done:
        raise _refused(sdk, "it cannot build the engine", logged)
    if unused := [m for m in logged.complaints if "Unused Input" in m]:
        plan.unlink()
        raise _refused(sdk, f"it does not understand what an input is for: {unused[0]}", logged)
    del kept_arrays
    seconds = time.perf_counter() - start
    sizes = {**inspecting.memory(logged.messages), "engine": plan.stat().st_size, "build": _peak()}
    return BuildResult(inspecting.parse(logged.messages), sizes, seconds)


def _refused(sdk: Sdk, what: str, logged: _BuildLog) -> EngineError:
    messages = [m.strip().splitlines()[0][:300] for m in logged.complaints if m.strip()][-LAST_MESSAGES:]
    return EngineError(
        f"TensorRT ({sdk.name} {sdk.version}): {what}",
        "Report it, with the output of: transom doctor; another backend may run the model",
        messages,
    )


def _peak() -> int:
    """Peak memory of this process in bytes; 0 on Windows, where Python does not report it."""
    try:
        import resource
    except ImportError:
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _logger(trt: Any, logged: _BuildLog) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            bad = severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR)
            if bad:  # if TensorRT aborts the process next, the host finds the message on stderr
                print(f"TensorRT: {message}", file=sys.stderr, flush=True)
            if bad or severity == trt.ILogger.WARNING:
                logged.complaints.append(message)
            elif severity == trt.ILogger.INFO or message.startswith(inspecting.HEADING):
                logged.messages.append(message)

    return Logger()


def _monitor(trt: Any, progress: Progress) -> Any:
    """Reports the outermost phase to `progress`. An exception raised there, Ctrl-C included, stops the build; `build`
    raises it again."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.raised: BaseException | None = None
            self._steps: dict[str, int] = {}
            self._outer = ""
            self._share = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase and not self._outer:
                self._outer = phase_name
                self._steps[phase_name] = max(1, num_steps)
            self._tell(None)

        def phase_finish(self, phase_name: str) -> None:
            if phase_name == self._outer:
                self._outer = ""

        def step_complete(self, phase_name: str, step: int) -> bool:
            share = (step + 1) / self._steps[phase_name] if phase_name == self._outer else None
            self._tell(share)
            return self.raised is None

        def _tell(self, share: float | None) -> None:
            self._share = min(1.0, max(self._share, share or 0.0))  # outermost phases follow one another
            if self.raised is None:
                try:
                    progress("build", self._share or None)
                except BaseException as e:  # noqa: BLE001  raised again by `build`: no exception may pass through C++
                    self.raised = e

    return Monitor()


def _writer(trt: Any, file: Any, monitor: Any) -> Any:
    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            try:
                return int(file.write(data))
            except OSError as e:  # a full disk; raised again by `build`
                monitor.raised = monitor.raised or e
                return 0

    return Writer()


def _profile(builder: Any, profile: ShapeProfile, inputs: Mapping[str, Shape]) -> Any:
    made = builder.create_optimization_profile()
    for name, shape in inputs.items():
        made.set_shape(name, *profile.shapes(shape))
    return made


def _attend(trt: Any, network: Any, spec: BuildSpec) -> list[Any]:
    """Replace the parser's attention by one with the settings that ONNX cannot express. Returns the arrays that must
    live as long as the network.

    The parser multiplies queries and keys by the square root of the scale, and the keys are the whole cache. Also, with
    a mask a kernel reads the whole cache; with lengths it reads only the filled part.
    """
    kept_arrays: list[Any] = []
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    fused = {f.name: f for f in spec.fused}
    for layer in layers:
        if layer.type != trt.LayerType.ATTENTION_INPUT:
            continue
        layer.__class__ = trt.IAttentionInputLayer
        parsed = layer.attention
        form = fused.pop(parsed.name.removeprefix("node_of_"), None)
        if form is None:
            continue
        q, k, v = (_tensor(layers, name) for name in (form.query, form.keys, form.values))
        kind = trt.CausalMaskKind.NONE if form.mask else trt.CausalMaskKind.LOWER_RIGHT
        attention = network.add_attention_v2(q, k, v, trt.AttentionNormalizationOp.SOFTMAX, kind)
        attention.name = f"{form.name}.fused"
        attention.decomposable = True  # used if no kernel fits; the summary of the layers shows it
        if form.mask:
            attention.mask = _tensor(layers, form.mask)
        else:
            attention.key_value_lengths = _tensor(layers, LENGTHS)
        if form.float8:
            dtype = np.float16 if spec.network.number == "float16" else np.float32
            scale = np.asarray(1 / LARGEST_FLOAT8, dtype)
            kept_arrays.append(scale)
            attention.normalization_quantize_to_type = trt.fp8
            attention.normalization_quantize_scale = network.add_constant((), trt.Weights(scale)).get_output(0)
        _replace(layers, parsed.get_output(0), attention.get_output(0))
    if fused:
        raise EngineError(f"TensorRT's parser has left out {next(iter(fused))}",
                          "Report it, with the output of: transom doctor")  # fmt: skip
    return kept_arrays


def _replace(layers: list[Any], old: Any, new: Any) -> None:
    for layer in layers:
        for i in range(layer.num_inputs):
            given = layer.get_input(i)
            if given is not None and given.name == old.name:
                layer.set_input(i, new)


def _tensor(layers: list[Any], name: str) -> Any:
    for layer in layers:
        for i in range(layer.num_outputs):
            if layer.get_output(i).name == name:
                return layer.get_output(i)
    raise EngineError(f"TensorRT's parser has left out {name}", "Report it, with the output of: transom doctor")
