"""The backend object: the five methods of the contract, each delegated to its module.

Importing this module imports no TensorRT: `probe` and `check` never do, `compile` and `load` do.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from transom.contract import Artifact, Claim, Device, Offer, Options, Progress, Refusal, Session, Verdict
from transom_tensorrt import probing

if TYPE_CHECKING:
    from transom.graph import Graph


class TensorRt:
    """Runs decoders on NVIDIA GPUs as TensorRT engines. Options: `precision` (see `transom_tensorrt.precision`),
    `context`, which is built into an engine, and `calibration`, for float8 activations."""

    name = "tensorrt"
    api = (1, 7)

    def probe(self, devices: Sequence[Device]) -> Sequence[Offer | Refusal]:
        return [probing.answer(device) for device in devices]

    def claim(self, graph: Graph, device: Device, options: Options) -> Sequence[Claim]:
        from transom_tensorrt.claims import claims

        return list(claims(graph, device, options))

    def compile(self, part: Graph, device: Device, options: Options, progress: Progress) -> Artifact:
        from transom_tensorrt.compiling import compile_graph

        return compile_graph(part, device, options, progress)

    def check(self, artifact: Artifact, device: Device) -> Verdict:
        return probing.judge(artifact.requires, device)

    def load(self, artifact: Artifact, device: Device, options: Options, scratch: Path) -> Session:
        from transom_tensorrt.loading import load_artifact

        return load_artifact(artifact, device, options, scratch)
