"""The catalogue's cards, and builds for them in a test's own folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transom.contract import Artifact, Device
from transom.graph import Graph
from transom.hardware.catalogue import catalogue
from transom_tensorrt import TensorRt, inspecting, network

BACKEND = TensorRt()


def target(name: str) -> Device:
    return next(d for d in catalogue() if d.id == f"remote:{name}")


def built(graph: Graph, card: str = "rtx-4090", **options: Any) -> Artifact:
    """Claimed as a whole, and compiled."""
    given: dict[str, Any] = {"precision": "auto", "context": None, "threads": None, "calibration": (), **options}
    refused = [c for c in BACKEND.claim(graph, target(card), given) if not c.ok]
    assert not refused
    return BACKEND.compile(graph, target(card), given, lambda stage, share: None)


def summaries(artifact: Artifact) -> tuple[inspecting.Summary, inspecting.Summary]:
    """Of prefill and decoding, as the builder told of them."""
    layers = inspecting.from_json(content(artifact, network.LAYERS_FILE))
    made = network.Network.from_json(content(artifact, network.NETWORK_FILE))
    caches = [name for k in made.kept for name in (k.input, k.output)]
    prefill, decode = (inspecting.summary(layers, i, caches) for i in (0, 1))
    return prefill, decode


def content(artifact: Artifact, name: str) -> str:
    found = artifact.files[name]
    return found.decode() if isinstance(found, bytes) else Path(found).read_text()
