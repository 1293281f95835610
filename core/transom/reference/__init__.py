"""The reference backend: NumPy, exact, part of core, band `fallback`. It is the smallest example of the contract.

Like every other backend, it is found through the entry-point group.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from transom.contract import Artifact, Backend, Claim, Device, Offer, Options, Progress, Refusal, Session, Verdict
from transom.contract import hookimpl as hookimpl
from transom.errors import option

if TYPE_CHECKING:
    from transom.graph import Graph

FORMAT = "1"
"""Increased whenever the format of artifacts changes."""


class ReferenceBackend:
    name = "reference"
    api = (1, 8)

    def probe(self, devices: Sequence[Device]) -> Sequence[Offer | Refusal]:
        return [
            Offer(d.id, "fallback", "NumPy reference: exact, float32, slow", deterministic=True)
            if d.kind == "cpu"
            else Refusal(
                d.id, "wrong_device", f"runs on the CPU only, not on {d.kind}", f"Use {option('device', 'cpu')}"
            )
            for d in devices
        ]

    def claim(self, graph: Graph, device: Device, options: Options) -> Sequence[Claim]:
        from transom.reference.executor import unsupported_reason

        reasons = ((str(node.name), unsupported_reason(node)) for node in graph.nodes())
        return [Claim(name, not reason, reason) for name, reason in reasons]

    def compile(self, part: Graph, device: Device, options: Options, progress: Progress) -> Artifact:
        from transom.authoring.folders import artifact_folder

        progress("write", 0.0)
        with artifact_folder("transom-reference-") as folder:
            part.save(folder / "graph.onnx")
            progress("write", 1.0)
        files: dict[str, bytes | Path] = {p.name: p for p in folder.iterdir()}
        return Artifact(files, {"format": FORMAT}, ("precision: float32, by NumPy",))

    def check(self, artifact: Artifact, device: Device) -> Verdict:
        if dict(artifact.requires) != {"format": FORMAT}:
            return Verdict("rebuild", f"made for {dict(artifact.requires)}, this is format {FORMAT}")
        return Verdict("ok")

    def load(self, artifact: Artifact, device: Device, options: Options, scratch: Path) -> Session:
        from transom.contract import Limits
        from transom.graph import Graph
        from transom.reference.executor import Executor
        from transom.reference.session import ReferenceSession

        path = artifact.files["graph.onnx"]
        assert isinstance(path, Path)
        executor = Executor(Graph.open(path), keep_weights=True)
        decoder = executor.graph.decoder
        made_for = decoder.context if decoder else 0
        requested = options.get("context")
        context = min(made_for, requested) if isinstance(requested, int) and requested > 0 else made_for
        limits = Limits(64, 4096, context, page_tokens=0)
        return ReferenceSession(executor, decoder, limits)


@hookimpl
def transom_backends() -> Iterable[Backend]:
    return [ReferenceBackend()]
