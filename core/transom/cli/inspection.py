"""The results of `transom inspect` as data, read from a model file without its weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.errors import TransomError
from transom.plugins import load_plugins
from transom.preparation.plugin_operators import explaining_rejected, register_operators
from transom.sources import local_path, resolve
from transom.sources.base import Texts

if TYPE_CHECKING:
    from transom.contract import Progress
    from transom.graph import Graph
    from transom.signature import Decoder
    from transom.sources import Source
    from transom.text import Tokenizer


@dataclass(frozen=True)
class TypeTotals:
    """All tensors of one type."""

    type: str
    """`"Q4_1"`, `"bfloat16"`, `"uint4, blocks of 32, with minimums"`."""
    tensors: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class SequenceMemory:
    """Memory of one sequence at a context length, in bytes."""

    context: int
    """Tokens."""
    cache_f16: int
    cache_f32: int
    total_f16: int
    """Weights as stored and a cache in half precision, without working space."""
    total_f32: int


@dataclass(frozen=True)
class Inspection:
    """Everything `transom inspect` shows."""

    name: str
    source: str
    path: str
    file_bytes: int | None
    architecture: str
    """The name in the file."""
    decoder: Decoder | None
    parameters: int
    weight_bytes: int
    """Bytes of the weights in the neutral graph."""
    stored: tuple[TypeTotals, ...]
    """Tensors in the file; empty if the source does not list them."""
    kept: tuple[TypeTotals, ...]
    """Weights in the neutral graph, as backends see them."""
    tokenizer: dict[str, Any] | None
    templates: tuple[str, ...]
    """Names of chat templates."""
    defaults: dict[str, Any]
    memory: tuple[SequenceMemory, ...]
    operators: dict[str, int]
    inputs: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    sizes: dict[str, int] = field(default_factory=dict)
    """Layers, hidden size, vocabulary and context, as the headers of a model that cannot be loaded state them."""
    cannot_load: str = ""
    """Why the model cannot be loaded, and what helps; empty if it can."""

    def to_dict(self) -> dict[str, Any]:
        from dataclasses import asdict

        return asdict(self)


def inspect_model(model: str | Path, progress: Progress | None = None) -> Inspection:
    """Open a model and describe it.

    Only headers are shown of a model that Transom cannot load because of its architecture or its settings.

    Raises:
        SourceError: it cannot be read.
    """
    source = resolve(model)
    try:
        source.require_supported(model)
    except TransomError as error:
        return _headers_of(source, model, error)
    plugins = load_plugins()
    register_operators(plugins)  # before a graph that uses them is read
    with explaining_rejected(plugins):
        opened = source.open(model, progress=progress)
    path = local_path(model)
    graph, decoder = opened.graph, opened.graph.decoder
    kept = tuple(_kinds(_kept(graph)))
    contents = source.contents(model)
    return Inspection(
        name=opened.name,
        source=opened.kind,
        path="" if path is None else str(path),
        file_bytes=None if path is None else _bytes_of(path),
        architecture=contents.architecture or (decoder.family if decoder else ""),
        decoder=decoder,
        parameters=decoder.parameters if decoder and decoder.parameters else sum(k.parameters for k in kept),
        weight_bytes=decoder.weight_bytes if decoder and decoder.weight_bytes else sum(k.bytes for k in kept),
        stored=tuple(_kinds(contents.tensors)),
        kept=kept,
        **_texts(Texts(opened.tokenizer, opened.chat_template, opened.generation)),
        memory=() if decoder is None else tuple(sequence_memory(decoder)),
        operators=_operators(graph),
        inputs=_values(graph.model.graph.inputs),
        outputs=_values(graph.model.graph.outputs),
        notes=tuple(dict.fromkeys([*graph.notes, *opened.notes])),
    )


def _headers_of(source: Source, model: str | Path, reason: TransomError) -> Inspection:
    """What the headers say of a model that cannot be loaded.

    Raises:
        TransomError: the reason, if they do not even name an architecture.
    """
    try:
        contents = source.contents(model)
    except TransomError:
        raise reason from None
    if not contents.architecture:
        raise reason
    notes = []
    try:
        texts = _texts(source.texts(model))
    except TransomError as error:
        texts, notes = _texts(None), [f"the tokenizer cannot be loaded: {error.cause}"]
    path = local_path(model)
    assert path is not None
    stored = tuple(_kinds(contents.tensors))
    return Inspection(
        name=path.stem if path.is_file() else path.resolve().name,
        source=source.kind,
        path=str(path),
        file_bytes=_bytes_of(path),
        architecture=contents.architecture,
        decoder=None,
        parameters=sum(k.parameters for k in stored),
        weight_bytes=sum(k.bytes for k in stored),
        stored=stored,
        kept=(),
        **texts,
        memory=(),
        operators={},
        notes=tuple(notes),
        sizes=dict(contents.sizes),
        cannot_load=str(reason),
    )


def _texts(texts: Texts | None) -> dict[str, Any]:
    """Tokenizer, templates and defaults as fields of `Inspection`."""
    if texts is None:
        return {"tokenizer": None, "templates": (), "defaults": {}}
    return {
        "tokenizer": None if texts.tokenizer is None else _tokenizer(texts.tokenizer),
        "templates": () if texts.chat_template is None else tuple(texts.chat_template.names),
        "defaults": {k: v for k, v in texts.generation.to_json().items() if v not in (None, [])},
    }


def sequence_memory(decoder: Decoder) -> Iterator[SequenceMemory]:
    """Memory at 512 tokens, at 1024 and each fourfold of it below the model's context, and at that context."""
    lengths = [512, *(1024 * 4**i for i in range(16))]
    for context in [*(n for n in lengths if n < decoder.context), decoder.context]:
        half, full = decoder.cache_bytes(context, 2), decoder.cache_bytes(context, 4)
        yield SequenceMemory(context, half, full, decoder.weight_bytes + half, decoder.weight_bytes + full)


def _kept(graph: Graph) -> Iterator[tuple[str, int, int]]:
    """(type, parameters, bytes) of each weight; the parts of a quantized one count once."""
    from transom.graph.builder import WEIGHT_META
    from transom.graph.weights import Blocked, Dense

    seen: set[int] = set()
    values = list(graph.model.graph.initializers.values())
    built = any(WEIGHT_META in value.meta for value in values)  # then unmarked values are constants
    for value in values:
        weight, tensor = value.meta.get(WEIGHT_META), value.const_value
        if isinstance(weight, Blocked | Dense):
            if id(weight) in seen:
                continue
            seen.add(id(weight))
            count = 1
            for size in weight.shape:
                count *= size
            yield _form(weight), count, weight.nbytes
        elif tensor is not None and not built and tensor.size > 16:  # smaller ones are constants
            yield str(tensor.dtype).lower(), tensor.size, tensor.nbytes


def _operators(graph: Graph) -> dict[str, int]:
    """Number of nodes by operator, most frequent first."""
    return dict(Counter(f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in graph.nodes()).most_common())


def _form(weight: Any) -> str:
    from transom.graph.weights import Dense

    if isinstance(weight, Dense):
        return weight.dtype
    also = [f"{weight.scale_dtype} scales"]
    also += ["minimums"] if weight.has_minimums else []
    also += ["zero points"] if weight.has_zero_points else []
    return f"{weight.dtype} in blocks of {weight.block}, {' and '.join(also)}"


def _kinds(tensors: Iterable[tuple[str, int, int]]) -> list[TypeTotals]:
    """Totals by type, most bytes first."""
    counts: Counter[str] = Counter()
    parameters: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for name, elements, size in tensors:
        counts[name] += 1
        parameters[name] += elements
        sizes[name] += size
    return [TypeTotals(name, counts[name], parameters[name], sizes[name]) for name, _ in sizes.most_common()]


def _bytes_of(path: Path) -> int:
    """Size of a file, or of all files in a directory."""
    if not path.is_dir():
        return path.stat().st_size
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def _tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    import json

    model = json.loads(tokenizer.to_json()).get("model", {})
    roles = {name: getattr(tokenizer, f"{name}_id") for name in ("bos", "eos", "unk", "pad")}
    return {
        "kind": str(model.get("type", "")),
        "vocabulary": tokenizer.vocabulary_size,
        "adds_bos": tokenizer.add_bos,
        "adds_eos": tokenizer.add_eos,
        "roles": {name: {"id": i, "token": tokenizer.id_to_token(i)} for name, i in roles.items() if i is not None},
        "special_tokens": {str(i): tokenizer.id_to_token(i) for i in sorted(tokenizer.special_ids)},
    }


def _values(values: Iterable[Any]) -> dict[str, str]:
    """Name -> `float32[tokens, 64]`."""
    from transom.graph import spec_of

    found = {}
    for value in values:
        spec = spec_of(value)
        shape = "?" if spec.shape is None else ", ".join("?" if d is None else str(d) for d in spec.shape)
        found[str(value.name)] = f"{spec.dtype}[{shape}]"
    return found
