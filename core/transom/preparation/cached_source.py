"""A source read once and kept: tokenizer, chat template, generation defaults and sizes, without the graph.

A warm start reads this in place of the checkpoint. Nothing here imports ONNX.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from transom.artifacts import artifact_key
from transom.errors import SourceError
from transom.signature import Decoder
from transom.text import ChatTemplate, GenerationDefaults, Tokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from transom.artifacts import Cache, Entry
    from transom.graph import Graph
    from transom.preparation.jobs import Job
    from transom.sources import SourceModel

FORMAT = 2
"""Part of the key: changes when what is stored, or how a source is read, changes."""


TOKENIZER_HEADER = "tokenizer.transom.json"
"""Where `tokenizer.json` is in Hugging Face's own form, as in a bundle: what Transom knows besides."""
_GRAPH = "graph.onnx"
_DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "transom")
"""Whose operators mean the same in every installation of one version."""


class Files(Protocol):
    """Named files that belong together: an entry of the cache, or a bundle."""

    @property
    def key(self) -> str: ...

    @property
    def files(self) -> Mapping[str, Path]: ...

    def read(self, name: str) -> bytes:
        """A file's content."""
        ...


@dataclass(frozen=True)
class CachedSource:
    """What the host needs of a source besides the compiled model."""

    name: str
    kind: str
    notes: tuple[str, ...]
    decoder: Decoder | None
    graph_digest: str
    inputs: Mapping[str, tuple[str, tuple[int | str | None, ...]]]
    """Element type and shape of each input of a graph that is not a decoder."""
    files: Files
    foreign: bool = False
    """Whether its graph may use operators that plugins bring: then the digest of the graph does not say what it means,
    and `key` does."""

    @property
    def key(self) -> str:
        return self.files.key

    def artifact_key(self, job: Job) -> str:
        """The key of what a job compiles out of this source."""
        return artifact_key({"source": self.key, "job": job.artifact_key})

    def tokenizer(self) -> Tokenizer | None:
        path = self.files.files.get("tokenizer.json")
        if path is None or TOKENIZER_HEADER not in self.files.files:
            return None if path is None else Tokenizer.load(path)
        return Tokenizer.joined(self.files.read(TOKENIZER_HEADER), self.files.read("tokenizer.json"), path)

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


def find(cache: Cache, content: str, context: int | None) -> CachedSource | None:
    """The cached source for this content and context, or None."""
    base = cache.sources.lookup(content)
    if base is None:
        return None
    found = _from_entry(base)
    key = variant(content, context, found.decoder)
    if key != content:
        base.release()
        entry = cache.sources.lookup(key)
        return None if entry is None else _from_entry(entry)
    return found


def variant(content: str, context: int | None, decoder: Decoder | None) -> str:
    """The key of a source as it is opened for a context.

    A source that is opened without one is right for every context up to its decoder's. Beyond that it may be another
    graph: rotary frequencies can depend on the context that is asked for, and the decoder's context with them.

    Args:
        content: the key of the source opened without a context.
        decoder: of the source opened without a context.
    """
    if context is None or decoder is None or context <= decoder.context:
        return content
    return artifact_key({"content": content, "context": context})


def keep(cache: Cache, key: str, model: SourceModel) -> CachedSource:
    """Store what an opened source brought, and return it."""
    import tempfile
    from pathlib import Path

    graph = model.graph
    facts = {
        "name": model.name,
        "kind": model.kind,
        "notes": list(dict.fromkeys([*graph.notes, *model.notes])),
        "decoder": graph.decoder.to_json() if graph.decoder else None,
        "graph_digest": graph.digest(),
        "inputs": {} if graph.decoder else _inputs(graph),
        "foreign": _is_foreign(graph),
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


def keep_graph(cache: Cache, key: str, graph: Graph) -> Entry:
    """Store the graph of a model that exists in memory only, weights included, for a child process to open."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory(prefix="transom-") as folder:
        graph.save(Path(folder) / _GRAPH)
        return cache.sources.write(key, {p.name: p for p in Path(folder).iterdir()})


def open_graph(cache: Cache, key: str) -> Graph:
    """The graph that `keep_graph` stored; weights are mapped, not read.

    Raises:
        SourceError: it is not there any more.
    """
    from transom.graph import Graph

    entry = cache.sources.lookup(key)
    if entry is None:
        raise SourceError("The model in memory is no longer in the cache, where it is kept while it is compiled",
                          "Load it again, and give the cache room: TRANSOM_CACHE_SIZE")  # fmt: skip
    return Graph.open(entry.files[_GRAPH])


def _is_foreign(graph: Graph) -> bool:
    from transom.graph.editing import all_nodes

    graphs = [graph.model.graph, *(f.graph for f in graph.model.functions.values())]
    return any(node.domain not in _DOMAINS for g in graphs for node in all_nodes(g))


def _inputs(graph: Graph) -> dict[str, list[Any]]:
    from transom.graph import spec_of

    specs = {str(v.name): spec_of(v) for v in graph.model.graph.inputs}
    return {name: [s.dtype, list(s.shape or ())] for name, s in specs.items()}


def _from_entry(entry: Entry) -> CachedSource:
    facts: Any = entry.manifest.facts
    decoder = Decoder.from_json(facts["decoder"]) if facts["decoder"] else None
    return CachedSource(
        facts["name"],
        facts["kind"],
        tuple(facts["notes"]),
        decoder,
        facts["graph_digest"],
        {name: (dtype, tuple(shape)) for name, (dtype, shape) in facts["inputs"].items()},
        entry,
        bool(facts.get("foreign")),
    )
