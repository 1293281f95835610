"""The backend object: the five methods of the contract, each delegated to its module.

This module imports neither torch nor triton. Neither do `probe` and `check`; `compile` and `load` do.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from transom.authoring.requirements import compare_requirements
from transom.contract import Artifact, Claim, Device, Offer, Options, Progress, Refusal, Session, Verdict
from transom_cuda_triton import probing

if TYPE_CHECKING:
    from transom.graph import Graph


class CudaTriton:
    """Runs decoders on NVIDIA GPUs of sm_70, 80, 86, 89 and 90. Options: `precision` (see
    `transom_cuda_triton.precision`) and `context`; an artifact may be loaded with other values of `context`."""

    name = "cuda_triton"
    api = (1, 8)

    def probe(self, devices: Sequence[Device]) -> Sequence[Offer | Refusal]:
        return [probing.answer(device) for device in devices]

    def claim(self, graph: Graph, device: Device, options: Options) -> Sequence[Claim]:
        from transom_cuda_triton.claims import claims

        return list(claims(graph, device, options))

    def compile(self, part: Graph, device: Device, options: Options, progress: Progress) -> Artifact:
        from transom_cuda_triton.compiling import compile_graph

        return compile_graph(part, device, options, progress)

    def check(self, artifact: Artifact, device: Device) -> Verdict:
        return compare_requirements(artifact.requires, probing.requirements(device))

    def load(self, artifact: Artifact, device: Device, options: Options, scratch: Path) -> Session:
        from transom_cuda_triton.loading import load_artifact

        return load_artifact(artifact, device, options)
