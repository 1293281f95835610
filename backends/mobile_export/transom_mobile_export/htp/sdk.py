"""Qualcomm's QNN through onnxruntime's plug-in `onnxruntime-qnn`: context binaries are made and opened here.

On x86-64 the same library emulates the HTP. Nothing here is imported, and no library opened, before it is needed.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transom.errors import EngineError, UnsupportedError
from transom_mobile_export.htp.probing import Chip

PROVIDER = "QNNExecutionProvider"
NO_FALLBACK = "session.disable_cpu_ep_fallback"
"""With it a session fails where a node would run on the CPU; without it, that happens silently."""
EFFORT, LESS_EFFORT = "2", "1"
"""How hard QNN's compiler tries. At 3, its most, some graphs come out wrong without a word (QNN 2.51): in a prefill of
128 tokens the rotated keys were wrong from the 65th token on. At 2 it ran out of memory over the 4-bit products of
SmolLM2-135M, which it compiled at 1."""
_registering = threading.Lock()
_registered: list[str] = []


def compile_context(
    model: Path, out: Path, chip: Chip, *, share: bool = False, last: bool = True, effort: str = EFFORT
) -> Any:
    """Compile an ONNX model to an ONNX file with one `EPContext` node and, beside it, the binary that it names. Values
    of the model that are float32 are float16 on the HTP.

    Args:
        share: put it into one context with the models that were compiled before, since the last one that was `last`.
            Then the binary is written with the last of them, and named after the first.
        effort: `EFFORT` or `LESS_EFFORT`.

    Returns:
        The session, which has to live until the last one is compiled.

    Raises:
        UnsupportedError: the HTP does not have an operator; it is named.
        EngineError: QNN cannot compile it, in its own words.
    """
    settings = {"ep.context_enable": "1", "ep.context_file_path": str(out), "ep.context_embed_mode": "0"}
    if share:
        settings["ep.share_ep_contexts"] = "1"
        if last:
            settings["ep.stop_share_ep_contexts"] = "1"
    provider = {"enable_htp_fp16_precision": "1", "htp_graph_finalization_optimization_mode": effort}
    try:
        made = session(model, chip, settings, provider)
    except _errors() as e:
        if left := _on_cpu(model, chip, provider):
            raise UnsupportedError(
                f"QNN compiles {', '.join(left)} of {model.name} for no HTP v{chip.htp_arch}, in the numbers asked for",
                "Try another precision, or another backend",
            ) from e
        raise EngineError(f"QNN cannot compile {model.name}: {e}", "Try another precision, or another backend") from e
    if not out.exists():
        raise EngineError(f"QNN compiled {model.name} and wrote no context", "Report it, with: transom doctor")
    return made


def open_context(model: Path, chip: Chip) -> Any:
    """An `onnxruntime.InferenceSession` over what `compile_context` wrote.

    Raises:
        EngineError: QNN does not open it.
    """
    try:
        return session(model, chip, {}, {})
    except _errors() as e:
        raise EngineError(f"QNN cannot open {model.name}: {e}", "Compile the model anew") from e


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
    return onnxruntime.InferenceSession(str(model), sess_options=options)


def _on_cpu(model: Path, chip: Chip, provider: Mapping[str, str]) -> list[str]:
    """The nodes that QNN leaves to the CPU, with their operators; none where it fails for another reason."""
    settings = {NO_FALLBACK: "0", "session.record_ep_graph_assignment_info": "1"}
    try:
        found = session(model, chip, settings, provider)
    except _errors():
        return []  # the first error says what is wrong
    parts = found.get_provider_graph_assignment_info()
    return [f"{n.name} ({n.op_type})" for part in parts if part.ep_name != PROVIDER for n in part.get_nodes()]


def _errors() -> tuple[type[Exception], ...]:
    """What onnxruntime raises; its classes have no base of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return (
        state.Fail, state.EPFail, state.InvalidGraph, state.InvalidArgument, state.InvalidProtobuf,
        state.NotImplemented, state.NoSuchFile, state.RuntimeException, RuntimeError,
    )  # fmt: skip
