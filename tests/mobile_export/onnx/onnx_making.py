"""Portable decoders as the host makes them: claimed, compiled, laid out as a bundle, and loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og

from transom.contract import Artifact, Device, Work
from transom.graph import Graph
from transom.hardware.cpu import probe_cpu
from transom.sessions import BufferedSession
from transom.text.defaults import GenerationDefaults
from transom_mobile_export.onnx.backend import OnnxDecoder

Array = np.ndarray[Any, np.dtype[Any]]
BACKEND = OnnxDecoder()
CPU: Device = probe_cpu()
VARIANT = "onnx"
NONE: Mapping[str, bytes] = {}


@dataclass
class Made:
    """A compiled decoder in a folder like a bundle's."""

    folder: Path
    artifact: Artifact
    session: BufferedSession
    context: int

    @property
    def files(self) -> dict[str, Path]:
        return {name: Path(str(path)) for name, path in self.artifact.files.items()}


def options(**given: Any) -> dict[str, Any]:
    return {"precision": "auto", "context": None, "threads": 2, "calibration": (), **given}


def made(graph: Graph, folder: Path, **given: Any) -> Made:
    asked = options(**given)
    refused = [claim for claim in BACKEND.claim(graph, CPU, asked) if not claim.ok]
    assert not refused, refused
    artifact = BACKEND.compile(graph, CPU, asked, lambda stage, share: None)
    own = folder / VARIANT
    own.mkdir(parents=True)
    files: dict[str, bytes | Path] = {}
    for name, content in artifact.files.items():
        files[name] = own / name
        if isinstance(content, bytes):
            (own / name).write_bytes(content)
        else:
            content.rename(own / name)
            temporary = content.parent
    temporary.rmdir()
    stored = Artifact(files, artifact.requires, artifact.notes)
    session = BACKEND.load(stored, CPU, asked, folder)
    assert isinstance(session, BufferedSession)
    assert graph.decoder is not None
    return Made(folder, stored, session, asked["context"] or graph.decoder.context)


def app_files(
    graph: Graph, it: Made, generation: GenerationDefaults, texts: Mapping[str, bytes] = NONE, name: str = VARIANT
) -> dict[str, bytes]:
    """What the backend gives for the root of the bundle."""
    assert graph.decoder is not None
    manifest = {"decoder": json.loads(graph.decoder.to_json())}
    variant = {
        "name": name,
        "files": {"model.onnx": f"{VARIANT}/model.onnx"},
        "context": it.context,
        "memory": json.loads(it.files["memory.json"].read_bytes()),
    }
    given = {"generation.json": json.dumps(generation.to_json()).encode(), **texts}
    return dict(BACKEND.app_files(manifest, variant, given))


def logits(session: BufferedSession, parts: Sequence[Sequence[int]]) -> Array:
    """Of one sequence that comes in parts, float32 [tokens, vocabulary]."""
    state = session.new_state()
    return np.concatenate([np.asarray(session.step([Work(state, part, "all")])[0]) for part in parts])


def greedy(session: BufferedSession, ids: Sequence[int], count: int, ends: Sequence[int] = ()) -> list[int]:
    """The likeliest tokens one after the other, without the one that ends them."""
    state, found = session.new_state(), []
    row = session.step([Work(state, ids)])[0]
    while len(found) < count and (token := int(np.argmax(np.asarray(row)))) not in ends:
        found.append(token)
        row = session.step([Work(state, [token])])[0]
    state.free()
    return found


def genai_greedy(model: og.Model, ids: Sequence[int], count: int, **search: Any) -> list[int]:
    """The same by ONNX Runtime GenAI."""
    params = og.GeneratorParams(model)
    params.set_search_options(do_sample=False, max_length=len(ids) + count, **search)
    generator = og.Generator(model, params)
    generator.append_tokens(list(ids))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)][len(ids) :]


def genai_logits(model: og.Model, parts: Sequence[Sequence[int]], **search: Any) -> Array:
    """What GenAI's cache leads to: logits after each part of a sequence, float32 [parts, vocabulary]."""
    params = og.GeneratorParams(model)
    params.set_search_options(do_sample=False, max_length=sum(map(len, parts)) + 1, **search)
    generator, found = og.Generator(model, params), []
    for part in parts:
        generator.append_tokens(list(part))
        found.append(np.asarray(generator.get_logits())[0, -1])
    return np.stack(found)
