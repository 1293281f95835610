"""Tiny decoders compiled for the emulated HTP, and what their logits ought to be."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from transom.contract import Artifact, Device, Offer, Work
from transom.graph import Graph
from transom.sessions import BufferedSession
from transom_mobile_export.qnn import probing
from transom_mobile_export.qnn.backend import Qnn
from transom_mobile_export.qnn.claims import read_decoder
from transom_mobile_export.qnn.observing import RunningPart, embedded, grouped, prefill
from transom_mobile_export.qnn.precision import QnnPrecision

Array = np.ndarray[Any, np.dtype[Any]]

CPU = Device("cpu", "cpu", "x86_64", 1 << 30)
PHONE = Device(
    "remote", "remote:snapdragon-8-gen-2", "hexagon_v73", 0, name="Snapdragon 8 Gen 2",
    drivers={"soc": "SM8550", "soc_model": "43", "htp_arch": "73"},
)  # fmt: skip
CHUNK, CONTEXT = 8, 32
needs_qnn = pytest.mark.skipif(
    not isinstance(probing.answer(CPU), Offer),
    reason=f"onnxruntime-qnn does not run here: {probing.answer(CPU)}",
)


def draw(rng: np.random.Generator, graph: Graph, count: int) -> list[int]:
    assert graph.decoder is not None
    found: list[int] = rng.integers(0, graph.decoder.vocabulary, count).tolist()
    return found


def options(rng: np.random.Generator, graph: Graph, precision: str, **more: Any) -> dict[str, Any]:
    texts = [draw(rng, graph, 48) for _ in range(3)]
    return {"precision": precision, "context": CONTEXT, "threads": None, "calibration": texts, **more}


def compiled(graph: Graph, asked: Mapping[str, Any], device: Device = CPU, **more: Any) -> Artifact:
    backend = Qnn(chunk=CHUNK, **more)
    claims = backend.claim(graph, device, asked)
    assert all(claim.ok for claim in claims), [c for c in claims if not c.ok]
    return backend.compile(graph, device, asked, lambda stage, share: None)


def stored(artifact: Artifact, folder: Path) -> Artifact:
    """The artifact as the host hands it to `load`: every file is a path."""
    files: dict[str, bytes | Path] = {}
    for name, content in artifact.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.read_bytes() if isinstance(content, Path) else content)
        files[name] = path
    return dataclasses.replace(artifact, files=files)


def opened(artifact: Artifact, folder: Path, asked: Mapping[str, Any]) -> BufferedSession:
    session = Qnn().load(stored(artifact, folder), CPU, asked, folder)
    assert isinstance(session, BufferedSession)
    return session


def logits(session: BufferedSession, chunks: Sequence[Sequence[int]]) -> Array:
    """Of one sequence that comes in chunks, float32 [tokens, vocabulary]."""
    state = session.new_state()
    return np.concatenate([np.asarray(session.step([Work(state, chunk, "all")])[0]) for chunk in chunks])


def float_logits(graph: Graph, ids: Sequence[int]) -> Array:
    """What the float graphs give in onnxruntime, part for part of a layer each; float32 [tokens, vocabulary]."""
    from transom_mobile_export.qnn.lowering import lower

    model = read_decoder(graph, QnnPrecision("float16", "float16"))
    hidden = embedded(model.embed, ids)
    for layer in model.layers:
        lowered = lower(model.reader, layer, tokens="tokens", cached="cached", context=len(ids))
        with RunningPart(lowered) as running:
            found = running(prefill(model.reader.decoder, layer, hidden, np.arange(len(ids))))
        hidden = found.get("hidden_out", hidden)
    assert len(grouped(model.layers)) == 1
    result: Array = found["logits"][0]
    return result
