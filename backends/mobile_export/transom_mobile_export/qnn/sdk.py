"""Compiles and opens context binaries with Qualcomm's QNN, through onnxruntime's plug-in `onnxruntime-qnn`.

On x86-64 the same library emulates the HTP. Packages and libraries are loaded only when needed.
"""

from __future__ import annotations

import re
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transom.errors import EngineError, UnsupportedError
from transom_mobile_export.qnn.printing import to_standard_error
from transom_mobile_export.qnn.probing import Chip

PROVIDER = "QNNExecutionProvider"
NO_FALLBACK = "session.disable_cpu_ep_fallback"
"""With this setting a session fails if a node would run on the CPU; without it, the node silently does."""
EFFORT = "1"
"""QNN's lowest optimization level. At higher levels it silently compiles wrong graphs (QNN 2.51). At 2 the logits of
int8 prefills of 64 tokens and more are off by up to a sixth with most numbers of heads, and 4-bit products of
SmolLM2-135M ran out of memory. At 3, in a prefill of 128 tokens the rotated keys were wrong from the 65th token on."""
ROOM = 1 << 20
"""Bytes; if at least as many are free, a failed write is not explained by a full disk."""
EDGES = ("QuantizeLinear", "DequantizeLinear")
_registering = threading.Lock()
_registered: list[str] = []


def compile_context(model: Path, out: Path, chip: Chip, *, share: bool = False, last: bool = True) -> Any:
    """Compile an ONNX model to an ONNX file with one `EPContext` node and, beside it, the binary that it names. Float32
    values of the model are float16 on the HTP.

    Args:
        share: put it into one context with the models compiled before it, back to the previous one with `last`. The
            binary is then written with the last of them and named after the first.

    Returns:
        The session, which must stay alive until the last model is compiled.

    Raises:
        UnsupportedError: the HTP lacks an operator, which is named.
        OSError: there is no disk space for the binary.
        EngineError: QNN cannot compile it; its own message is included.
    """
    settings = {"ep.context_enable": "1", "ep.context_file_path": str(out), "ep.context_embed_mode": "0"}
    if share:
        settings["ep.share_ep_contexts"] = "1"
        if last:
            settings["ep.stop_share_ep_contexts"] = "1"
    provider = {"enable_htp_fp16_precision": "1", "htp_graph_finalization_optimization_mode": EFFORT}
    try:
        made = session(model, chip, settings, provider)
    except _errors() as e:
        _need_room(out.parent)
        if left := _on_cpu(model, chip, provider):
            raise UnsupportedError(
                f"QNN cannot compile {', '.join(left)} of {model.name} for HTP v{chip.htp_arch} in this precision",
                "Try another precision, or another backend",
            ) from e
        raise EngineError(f"QNN cannot compile {model.name}: {e}", "Try another precision, or another backend") from e
    if not out.exists():
        raise EngineError(f"QNN compiled {model.name} but wrote no context", "Report it, with: transom doctor")
    return made


def open_context(model: Path, chip: Chip) -> Any:
    """An `onnxruntime.InferenceSession` over the result of `compile_context`.

    Raises:
        EngineError: QNN does not open it.
    """
    try:
        return session(model, chip, {}, {})
    except _errors() as e:
        raise EngineError(f"QNN cannot open {model.name}: {e}", "Compile the model again") from e


def sdk_version(context: Path) -> str:
    """Version of the QNN SDK that compiled a context, such as `2.51.0`, from its `EPContext` node.

    Raises:
        EngineError: the node does not state it.
    """
    import onnx_ir as ir

    (node,) = ir.load(context).graph
    said = node.attributes.get_string("ep_sdk_version", "")
    found = re.match(r"v?(\d+\.\d+\.\d+)", said)
    if found is None:
        cause = f"QNN compiled {context.name} without stating the version of its SDK ({said!r})"
        raise EngineError(cause, "Report it, with: transom doctor")
    return found[1]


def session(model: Path, chip: Chip, settings: Mapping[str, str], provider: Mapping[str, str]) -> Any:
    """An `onnxruntime.InferenceSession` whose nodes are all on the HTP, unless the settings allow otherwise."""
    import onnxruntime
    import onnxruntime_qnn

    with _registering:
        if not _registered:
            onnxruntime.register_execution_provider_library(PROVIDER, onnxruntime_qnn.get_library_path())
            _registered.append(PROVIDER)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    for key, value in {NO_FALLBACK: "1", **settings}.items():
        options.add_session_config_entry(key, value)
    devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == PROVIDER]
    options.add_provider_for_devices(
        devices[:1],
        {
            "backend_path": onnxruntime_qnn.get_qnn_htp_path(), "soc_model": str(chip.soc_model),
            "htp_arch": str(chip.htp_arch), **provider,
        },
    )  # fmt: skip
    with to_standard_error():
        return onnxruntime.InferenceSession(str(model), sess_options=options)


def _need_room(folder: Path) -> None:
    """Raises OSError if nothing can be written: QNN reports that it could not write, but not why."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(ROOM))


def _on_cpu(model: Path, chip: Chip, provider: Mapping[str, str]) -> list[str]:
    """The nodes that QNN leaves to the CPU, with their operators; empty if it fails for another reason.

    Quantization of a graph's inputs and outputs always goes to the CPU if that is allowed, so it is not counted.
    """
    settings = {NO_FALLBACK: "0", "session.record_ep_graph_assignment_info": "1"}
    try:
        found = session(model, chip, settings, provider)
    except _errors():
        return []  # the first error is the one to report
    parts = found.get_provider_graph_assignment_info()
    left = [node for part in parts if part.ep_name != PROVIDER for node in part.get_nodes()]
    return [f"{node.name} ({node.op_type})" for node in left if node.op_type not in EDGES]


def _errors() -> tuple[type[Exception], ...]:
    """The exceptions of onnxruntime, which have no common base class."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return (
        state.Fail, state.EPFail, state.InvalidGraph, state.InvalidArgument, state.InvalidProtobuf,
        state.NotImplemented, state.NoSuchFile, state.RuntimeException, RuntimeError,
    )  # fmt: skip
