"""The backend object: the methods of the contract and the optional ones for bundles, each delegated to its module.

Importing this module imports no SDK: only `compile` and `load` do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.contract import Artifact, Claim, Device, Offer, Options, Progress, Refusal, Session, Verdict
from transom_mobile_export.qnn import probing
from transom_mobile_export.qnn.layout import CHUNK, LARGEST

if TYPE_CHECKING:
    from transom.contract_optional import StorageForm
    from transom.graph import Graph
    from transom.signature import Decoder


class Qnn:
    """Compiles decoders for the HTP of Snapdragon chips, and runs them on Qualcomm's emulator. Options: `precision`
    (see `transom_mobile_export.qnn.precision`), `context`, which is built in, and `calibration`, the texts on which
    activation ranges are observed.

    Args:
        chunk: largest number of new tokens of a prefill.
        largest: largest number of bytes of weights in one context; a larger model is cut into parts.
    """

    name = "qnn"
    api = (1, 7)

    def __init__(self, chunk: int = CHUNK, largest: int = LARGEST) -> None:
        self.chunk, self.largest = chunk, largest

    def probe(self, devices: Sequence[Device]) -> Sequence[Offer | Refusal]:
        return [probing.answer(device) for device in devices]

    def claim(self, graph: Graph, device: Device, options: Options) -> Sequence[Claim]:
        from transom_mobile_export.qnn.claims import claims

        return list(claims(graph, device, options))

    def compile(self, part: Graph, device: Device, options: Options, progress: Progress) -> Artifact:
        from transom_mobile_export.qnn.compiling import compile_graph

        return compile_graph(part, device, options, progress, chunk=self.chunk, largest=self.largest)

    def check(self, artifact: Artifact, device: Device) -> Verdict:
        return probing.judge(artifact.requires, device)

    def load(self, artifact: Artifact, device: Device, options: Options, scratch: Path) -> Session:
        from transom_mobile_export.qnn.loading import load_artifact

        return load_artifact(artifact, options)

    def app_files(
        self, manifest: Mapping[str, Any], variant: Mapping[str, Any], texts: Mapping[str, bytes]
    ) -> Mapping[str, bytes]:
        from transom_mobile_export.qnn.app import app_files

        return app_files(variant)

    def fits(self, variant: Mapping[str, Any], device: Device) -> Verdict:
        return probing.fits(variant, device)

    def machine_of(self, library: str) -> str:
        return probing.machine_of(library)

    def storage_form(self, decoder: Decoder, device: Device, precision: str) -> StorageForm:
        from transom_mobile_export.qnn.storage import form_on

        return form_on(decoder, device, precision)
