"""What the cache keeps of a source: tokenizer, chat template, generation defaults and sizes, without the graph.

A warm load reads this instead of the checkpoint. Nothing here imports ONNX.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypedDict, TypeVar

from transom.artifacts import Entry, artifact_key
from transom.errors import SourceError
from transom.signature import Decoder
from transom.text import ChatTemplate, GenerationDefaults, Tokenizer
from transom.typed import WrongType, from_json, typed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from transom.artifacts import Cache
    from transom.graph import Graph
    from transom.preparation.jobs import Job
    from transom.sources import SourceModel

T = TypeVar("T")
Dimensions = tuple[int | str | None, ...]
"""Sizes, names of sizes, and None where a size is unknown."""

FORMAT = 2
"""Part of the key. Increase it when the stored content changes, or the way in which a source is read."""


TOKENIZER_HEADER = "tokenizer.transom.json"
"""Transom's own tokenizer data, beside a `tokenizer.json` in Hugging Face's form (as in a bundle)."""
_GRAPH = "graph.onnx"
_DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "transom")
"""Domains whose operators mean the same in every installation of one Transom version."""


class _Facts(TypedDict):
    """The facts of an entry that `keep` writes."""

    name: str
    kind: str
    notes: list[str]
    decoder: str | None
    graph_digest: str
    inputs: dict[str, tuple[str, Dimensions]]
    foreign: bool


class DamagedSource(SourceError):
    """A file that Transom keeps of a source is damaged. It is no longer in the cache: the next load reads the model."""


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
    """The parts of a source that the host needs besides the compiled model."""

    name: str
    kind: str
    notes: tuple[str, ...]
    decoder: Decoder | None
    graph_digest: str
    inputs: Mapping[str, tuple[str, Dimensions]]
    """Element type and shape of each input of a graph that is not a decoder."""
    files: Files
    uses_plugin_operators: bool = False
    """Whether the graph may use operators of plugins. Then the digest of the graph does not determine what it computes;
    `key` does."""

    @property
    def key(self) -> str:
        return self.files.key

    def artifact_key(self, job: Job) -> str:
        """The key of the artifact that a job compiles from this source."""
        return artifact_key({"source": self.key, "job": job.artifact_key})

    def tokenizer(self) -> Tokenizer | None:
        """Raises DamagedSource, as `chat_template` and `generation` do."""
        path = self.files.files.get("tokenizer.json")
        if path is None:
            return None
        try:
            if TOKENIZER_HEADER not in self.files.files:
                return Tokenizer.load(path)
            return Tokenizer.from_parts(self.files.read(TOKENIZER_HEADER), self.files.read("tokenizer.json"), path)
        except SourceError as error:
            self._damaged("tokenizer.json", error)

    def chat_template(self) -> ChatTemplate | None:
        return self._read("chat_template.json", ChatTemplate.from_json)

    def generation(self) -> GenerationDefaults:
        return self._read("generation.json", GenerationDefaults.from_json) or GenerationDefaults()

    def _read(self, name: str, parse: Callable[[object], T]) -> T | None:
        if name not in self.files.files:
            return None
        try:
            return parse(from_json(dict[str, object], self.files.read(name)))
        except (OSError, WrongType) as error:
            self._damaged(name, error)

    def _damaged(self, name: str, error: Exception) -> NoReturn:
        if isinstance(self.files, Entry):  # a bundle stays as it is
            self.files.discard(f"its file {name} is damaged")
        raise DamagedSource(
            f"The file {name} that the cache keeps of {self.name} is damaged", "Load the model again", [str(error)]
        ) from error


def find(cache: Cache, content: str, context: int | None) -> CachedSource | None:
    """The cached source for this content and context, or None."""
    base = cache.sources.lookup(content, facts=_Facts)
    if base is None:
        return None
    found = _from_entry(base)
    key = variant(content, context, found.decoder if found is not None else None)
    if found is not None and key != content:
        base.release()
        entry = cache.sources.lookup(key, facts=_Facts)
        return None if entry is None else _from_entry(entry)
    return found


def variant(content: str, context: int | None, decoder: Decoder | None) -> str:
    """The key of a source that is opened for a context.

    A source opened without a context serves every context up to its decoder's. For a longer context the graph may
    differ: rotary frequencies, and the decoder's own context with them, can depend on the requested context.

    Args:
        content: the key of the source opened without a context.
        decoder: the decoder of the source opened without a context.
    """
    if context is None or decoder is None or context <= decoder.context:
        return content
    return artifact_key({"content": content, "context": context})


def keep(cache: Cache, key: str, model: SourceModel) -> CachedSource:
    """Store everything of an opened source but its graph, and return it."""
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
        "foreign": _may_use_plugin_operators(graph),
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
    kept = _from_entry(entry)
    assert kept is not None
    return kept


def keep_graph(cache: Cache, key: str, graph: Graph) -> Entry:
    """Store the graph of a model in memory, weights included, for a child process to open."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory(prefix="transom-") as folder:
        graph.save(Path(folder) / _GRAPH)
        return cache.sources.write(key, {p.name: p for p in Path(folder).iterdir()})


def open_graph(cache: Cache, key: str) -> Graph:
    """The graph that `keep_graph` stored; weights are mapped, not read.

    Raises:
        SourceError: the cache has removed it.
    """
    from transom.graph import Graph

    entry = cache.sources.lookup(key)
    if entry is None:
        raise SourceError("The model in memory is no longer in the cache, where it is kept while it is compiled",
                          "Load it again, and give the cache room: TRANSOM_CACHE_SIZE")  # fmt: skip
    return Graph.open(entry.files[_GRAPH])


def _may_use_plugin_operators(graph: Graph) -> bool:
    from transom.graph.editing import all_nodes

    graphs = [graph.model.graph, *(f.graph for f in graph.model.functions.values())]
    return any(node.domain not in _DOMAINS for g in graphs for node in all_nodes(g))


def _inputs(graph: Graph) -> dict[str, list[Any]]:
    from transom.graph import spec_of

    specs = {str(v.name): spec_of(v) for v in graph.model.graph.inputs}
    return {name: [s.dtype, list(s.shape or ())] for name, s in specs.items()}


def _from_entry(entry: Entry) -> CachedSource | None:
    """The source in an entry; None, and the entry is removed, if its decoder is none that can be."""
    facts = typed(_Facts, dict(entry.manifest.facts))
    try:
        decoder = Decoder.from_json(facts["decoder"]) if facts["decoder"] else None
    except ValueError as error:
        entry.discard(f"its decoder is damaged: {error}")
        entry.release()
        return None
    notes, inputs = tuple(facts["notes"]), facts["inputs"]
    return CachedSource(
        facts["name"], facts["kind"], notes, decoder, facts["graph_digest"], inputs, entry, facts["foreign"]
    )
