"""The backend object: the five methods of the contract, each delegated to its module.

This module does not import OpenVINO. Neither do `probe` and `check`; `compile` and `load` do.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from transom.authoring.requirements import compare_requirements
from transom.contract import Artifact, Claim, Device, Offer, Options, Progress, Refusal, Session, Verdict
from transom_openvino_cpu import probing

if TYPE_CHECKING:
    from transom.graph import Graph


class OpenVinoCpu:
    """Runs on CPUs through OpenVINO. Options: `precision` (see `transom_openvino_cpu.precision`), `context`,
    `threads`; an artifact may be loaded with other values of the last two."""

    name = "openvino_cpu"
    api = (1, 8)

    def probe(self, devices: Sequence[Device]) -> Sequence[Offer | Refusal]:
        return [probing.answer(device) for device in devices]

    def claim(self, graph: Graph, device: Device, options: Options) -> Sequence[Claim]:
        from transom.graph.reading import matrices
        from transom_openvino_cpu import claims
        from transom_openvino_cpu.precision import resolve

        decoder = graph.decoder is not None
        precision = resolve(options, device, matrices(graph), decoder=decoder)
        return list(claims.claims(graph, precision, device))

    def compile(self, part: Graph, device: Device, options: Options, progress: Progress) -> Artifact:
        from transom_openvino_cpu.compiling import compile_graph

        return compile_graph(part, device, options, progress)

    def check(self, artifact: Artifact, device: Device) -> Verdict:
        return compare_requirements(artifact.requires, probing.requirements(device))

    def load(self, artifact: Artifact, device: Device, options: Options, scratch: Path) -> Session:
        from transom_openvino_cpu.loading import load_artifact

        return load_artifact(artifact, device, options)
