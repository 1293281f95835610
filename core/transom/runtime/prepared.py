"""A source read once and kept: tokenizer, chat template, generation defaults and sizes, without the graph.

A warm start reads this in place of the checkpoint. Nothing here imports ONNX.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transom.signature import Decoder
from transom.text import ChatTemplate, GenerationDefaults, Tokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transom.artifacts import Cache, Entry
    from transom.graph import Graph
    from transom.sources import SourceModel

FORMAT = 1
"""Part of the key: changes when what is stored, or how a source is read, changes."""


@dataclass(frozen=True)
class Prepared:
    """What the host needs of a source besides the compiled model."""

    name: str
    kind: str
    notes: tuple[str, ...]
    decoder: Decoder | None
    graph_digest: str
    inputs: Mapping[str, tuple[str, tuple[int | str | None, ...]]]
    """Element type and shape of each input of a graph that is not a decoder."""
    files: Entry

    def tokenizer(self) -> Tokenizer | None:
        path = self.files.files.get("tokenizer.json")
        return None if path is None else Tokenizer.load(path)

    def chat_template(self) -> ChatTemplate | None:
        data = self._json("chat_template.json")
        return None if data is None else ChatTemplate.from_json(data)

    def generation(self) -> GenerationDefaults:
        data = self._json("generation.json")
        return GenerationDefaults() if data is None else GenerationDefaults.from_json(data)

    def _json(self, name: str) -> Any:
        if name not in self.files.files:
            return None
        return json.loads(self.files.read(name))


def keep(cache: Cache, key: str, model: SourceModel) -> Prepared:
    """Store what an opened source brought, and return it."""
    import tempfile
    from pathlib import Path

    graph = model.graph
    facts = {
        "name": model.name,
        "kind": model.kind,
        "notes": [*graph.notes, *model.notes],
        "decoder": graph.decoder.to_json() if graph.decoder else None,
        "graph_digest": graph.digest(),
        "inputs": {} if graph.decoder else _inputs(graph),
    }
    with tempfile.TemporaryDirectory(prefix="transom-") as folder:
        blobs: dict[str, bytes | str | Path] = {"generation.json": json.dumps(model.generation.to_json())}
        if model.tokenizer is not None:
            path = Path(folder) / "tokenizer.json"
            model.tokenizer.save(path)
            blobs["tokenizer.json"] = path
        if model.chat_template is not None:
            blobs["chat_template.json"] = json.dumps(model.chat_template.to_json())
        entry = cache.sources.write(key, blobs, facts)
    return _from_entry(entry)


def keep_graph(cache: Cache, key: str, graph: Graph) -> str:
    """Store the graph of a model that exists in memory only, weights included; returns the path of its ONNX file."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory(prefix="transom-") as folder:
        graph.save(Path(folder) / "graph.onnx")
        entry = cache.sources.write(f"{key}-graph", {p.name: p for p in Path(folder).iterdir()})
    return str(entry.files["graph.onnx"])


def _inputs(graph: Graph) -> dict[str, list[Any]]:
    from transom.graph import spec_of

    specs = {str(v.name): spec_of(v) for v in graph.model.graph.inputs}
    return {name: [s.dtype, list(s.shape or ())] for name, s in specs.items()}


def find(cache: Cache, key: str) -> Prepared | None:
    """The prepared source with this key, or None."""
    entry = cache.sources.lookup(key)
    return None if entry is None else _from_entry(entry)


def _from_entry(entry: Entry) -> Prepared:
    facts: Any = entry.manifest.facts
    decoder = Decoder.from_json(facts["decoder"]) if facts["decoder"] else None
    return Prepared(
        facts["name"],
        facts["kind"],
        tuple(facts["notes"]),
        decoder,
        facts["graph_digest"],
        {name: (dtype, tuple(shape)) for name, (dtype, shape) in facts["inputs"].items()},
        entry,
    )
