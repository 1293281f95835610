"""The backend object: the methods of the contract and the optional ones for bundles, each delegated to its module.

Importing this module does not import ONNX Runtime; only `load` does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.contract import Artifact, Claim, Device, Offer, Options, Progress, Refusal, Session, Verdict
from transom_mobile_export.onnx import probing

if TYPE_CHECKING:
    from transom.contract_optional import StorageForm
    from transom.graph import Graph
    from transom.signature import Decoder


class OnnxDecoder:
    """Writes decoders for phones and boards that ONNX Runtime GenAI loads directly, and runs them in ONNX Runtime on
    the CPU. Options: `precision` (see `transom_mobile_export.onnx.precision`), `context` and `threads`."""

    name = "onnx"
    api = (1, 7)

    def probe(self, devices: Sequence[Device]) -> Sequence[Offer | Refusal]:
        return [probing.answer(device) for device in devices]

    def claim(self, graph: Graph, device: Device, options: Options) -> Sequence[Claim]:
        from transom_mobile_export.onnx.claims import claims

        return list(claims(graph, options))

    def compile(self, part: Graph, device: Device, options: Options, progress: Progress) -> Artifact:
        from transom_mobile_export.onnx.compiling import compile_graph

        return compile_graph(part, options, progress)

    def check(self, artifact: Artifact, device: Device) -> Verdict:
        return probing.judge(artifact.requires, device)

    def load(self, artifact: Artifact, device: Device, options: Options, scratch: Path) -> Session:
        from transom_mobile_export.onnx.loading import load_artifact

        return load_artifact(artifact, device, options)

    def app_files(
        self, manifest: Mapping[str, Any], variant: Mapping[str, Any], texts: Mapping[str, bytes]
    ) -> Mapping[str, bytes]:
        from transom_mobile_export.onnx.app_files import app_files

        return app_files(manifest, variant, texts)

    def fits(self, variant: Mapping[str, Any], device: Device) -> Verdict:
        return probing.fits(variant, device)

    def storage_form(self, decoder: Decoder, device: Device, precision: str) -> StorageForm:
        from transom_mobile_export.onnx.storage import form_of

        return form_of(decoder, precision)
