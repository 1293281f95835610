"""The protocol of a source, the models that it returns, and helpers for paths and content hashes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from transom.contract import Progress

if TYPE_CHECKING:
    import onnx_ir as ir

    from transom.graph import Graph
    from transom.text.chat_template import ChatTemplate
    from transom.text.defaults import GenerationDefaults
    from transom.text.tokenizer import Tokenizer

Spec = Any
"""How the user names a model: a path as str or `os.PathLike`, or an object that a source supports."""


@dataclass
class SourceModel:
    """An opened model: the neutral graph, and the texts and settings for generating with it."""

    graph: Graph
    tokenizer: Tokenizer | None
    chat_template: ChatTemplate | None
    generation: GenerationDefaults
    name: str
    """The model's own name or that of its file, human-readable."""
    kind: str
    """The kind of its source: `"gguf"`, `"hf"`, …"""
    notes: list[str] = field(default_factory=list)
    """What the source changed or left out, for the report."""
    unchecked: bool = False
    """True: reading a weight does not check for NaN and infinity, so the host checks before it compiles."""


@dataclass(frozen=True)
class Contents:
    """The contents of a model's files, in the file format's own terms."""

    architecture: str = ""
    tensors: tuple[tuple[str, int, int], ...] = ()
    """Type, number of elements and bytes of each tensor; empty: the files do not say."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Layers, hidden size, vocabulary and context (tokens), as far as the files state them under their usual names."""


class Texts(NamedTuple):
    """What turns text into tokens and back, and the model's own sampling options."""

    tokenizer: Tokenizer | None
    chat_template: ChatTemplate | None
    generation: GenerationDefaults


@dataclass(frozen=True)
class OriginalGraph:
    """A model that is a graph itself. It is compared with that graph as exported."""

    file: str
    """The file's name, human-readable."""
    read: Callable[[], ir.Model]


@dataclass(frozen=True)
class Pretrained:
    """A model in files that the transformers package may read. It is compared with the outputs of transformers."""

    path: Path
    arguments: Mapping[str, Any]
    """The arguments of `from_pretrained`."""
    kind: str = "this model"
    """The object of messages such as "It may not support this model"."""
    fix: str = "Update transformers, or see whether the directory is complete"
    """The fix when transformers cannot read the files."""
    misread: Callable[[Mapping[str, Any], Sequence[int]], list[str]] | None = None
    """Returns the settings that transformers misreads, as text. Called with the configuration of transformers and the
    sliding window of each layer (0: none). None: transformers misreads nothing in such files."""


@dataclass(frozen=True)
class InMemory:
    """A model that is an object of this process. It is compared with itself."""

    model: Any


class Source(Protocol):
    """One way to get a model."""

    @property
    def kind(self) -> str:
        """A short name, shown in reports."""

    def matches(self, spec: Spec) -> bool:
        """Whether this source can open the spec. Cheap: reads at most the first bytes of a file."""

    def require_supported(self, spec: Spec) -> None:
        """Raise the reason why the model cannot be built, if its architecture or its settings show one.

        Reads headers, and imports nothing heavy for a model that it can build. It is called before the files are hashed
        and before a child process is started.

        Raises:
            SourceError: the source cannot build this model, or a file is missing or cannot be read.
            MissingExtra: it needs a package that is not installed.
        """

    def fingerprint(self, spec: Spec) -> str:
        """A hash of the content: equal content has equal fingerprints. Builds nothing.

        Raises:
            SourceError: a file is missing or cannot be read.
        """

    def open(self, spec: Spec, *, context: int | None = None, progress: Progress | None = None) -> SourceModel:
        """Build the graph. Weights stay on disk.

        Args:
            spec: a spec for which `matches` returns True.
            context: the tokens that the model has to hold; None: the model's own context. It matters to models whose
                rotary frequencies depend on it.
            progress: called with (stage, share done).

        Raises:
            SourceError: the model cannot be opened; the message has the cause and the fix.
        """

    def original(self, spec: Spec) -> OriginalGraph | Pretrained | InMemory:
        """The original that `transom verify` compares the model with.

        Raises:
            SourceError: the files cannot be read.
        """

    def chat_template(self, spec: Spec) -> ChatTemplate | None:
        """The chat template, without reading the tokenizer, which takes longer. None: there is none, or it is not known
        before the model is opened.

        Raises:
            SourceError: the files cannot be read.
        """
        return None

    def license(self, spec: Spec) -> str | None:
        """The license that the model itself names; None: it names none."""
        return None

    def contents(self, spec: Spec) -> Contents:
        """The contents of the files, for `transom inspect`. Reads no weight.

        Raises:
            SourceError: the files cannot be read.
        """
        return Contents()

    def texts(self, spec: Spec) -> Texts:
        """Tokenizer, chat template and generation defaults, without building the graph.

        Raises:
            SourceError: the files cannot be read, or the tokenizer is of an unknown kind.
        """
        from transom.text.defaults import GenerationDefaults

        return Texts(None, None, GenerationDefaults())


def local_path(spec: Spec) -> Path | None:
    """The spec as a path with `~` expanded; None: it is not a path."""
    if isinstance(spec, str):
        return Path(spec).expanduser() if spec else None
    if isinstance(spec, Path):
        return spec.expanduser()
    if hasattr(spec, "__fspath__"):
        raw = spec.__fspath__()
        return Path(raw.decode() if isinstance(raw, bytes) else raw).expanduser()
    return None


def folder_name(folder: Path) -> str:
    """The name of a model's folder; for a snapshot in the hub's cache, which is named after its commit, the model's."""
    folder = folder.resolve()
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.rpartition("--")[2]
    return folder.name


def begins_with(path: Path, magic: bytes) -> bool:
    """Whether the file begins with these bytes."""
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def content_hash(paths: Sequence[Path], progress: Progress | None = None) -> str:
    """The hash of the files' content, in order. Hashes are cached by path, size and modification time."""
    from transom.artifacts import Cache

    cache = Cache.default()
    hashes = [cache.content_hash(path, progress) for path in paths]
    if len(hashes) == 1:
        return hashes[0]
    import hashlib

    return hashlib.blake2b(" ".join(hashes).encode(), digest_size=20).hexdigest()


def summarize(items: Iterable[str], most: int = 3) -> str:
    """`a, b, c and 12 more`."""
    names = list(items)
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
