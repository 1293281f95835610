"""What a source is and what it yields; naming the content of files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from transom.contract import Progress

if TYPE_CHECKING:
    import onnx_ir as ir

    from transom.graph import Graph
    from transom.text.chat_template import ChatTemplate
    from transom.text.defaults import GenerationDefaults
    from transom.text.tokenizer import Tokenizer

Spec = Any
"""What the user names a model by: a path as str or `os.PathLike`, or an object that a source knows."""


@dataclass
class SourceModel:
    """A model as it came in: the neutral graph and what is needed to talk to it."""

    graph: Graph
    tokenizer: Tokenizer | None
    chat_template: ChatTemplate | None
    generation: GenerationDefaults
    name: str
    """For people: the model's own name, or that of its file."""
    kind: str
    """The source's kind: `"gguf"`, `"hf"`, …"""
    notes: list[str] = field(default_factory=list)
    """What was changed or left out on the way in, for the report."""
    unchecked: bool = False
    """Nothing looks for NaN and infinity when a weight is read, so it is done before the model is compiled."""


@dataclass(frozen=True)
class Contents:
    """What the files of a model hold, in their own words."""

    architecture: str = ""
    tensors: tuple[tuple[str, int, int], ...] = ()
    """Type, number of elements and bytes of each; empty where the files do not say."""


@dataclass(frozen=True)
class OriginalGraph:
    """A model that is a graph itself: compared with that graph as it was exported."""

    file: str
    """Its name, for people."""
    read: Callable[[], ir.Model]


@dataclass(frozen=True)
class Pretrained:
    """A model in files that the transformers package may read: compared with what it computes."""

    path: Path
    arguments: Mapping[str, Any]
    """Those of `from_pretrained`."""
    kind: str = "this model"
    """What transformers has to support, as in "It may not support this model"."""
    fix: str = "Update transformers, or see whether the directory is complete"
    """What to do where it cannot read the files."""
    misread: Callable[[Mapping[str, Any], Sequence[int]], list[str]] | None = None
    """Settings of the files that transformers takes for something else, in words. Called with its configuration and the
    sliding window of each layer, 0 for none. None: it reads such files as they are."""


@dataclass(frozen=True)
class InMemory:
    """A model that is an object of this program: compared with itself."""

    model: Any


class Source(Protocol):
    """One way to get a model."""

    @property
    def kind(self) -> str:
        """A short name, shown in reports."""

    def matches(self, spec: Spec) -> bool:
        """Whether the spec is for this source. Cheap; opens no file beyond a look at its first bytes."""

    def fingerprint(self, spec: Spec) -> str:
        """A name for the content: equal content gives equal names, without building anything.

        Raises:
            SourceError: a file is missing or cannot be read.
        """

    def open(self, spec: Spec, *, context: int | None = None, progress: Progress | None = None) -> SourceModel:
        """Build the graph; weights stay on disk.

        Args:
            spec: what `matches` said yes to.
            context: tokens the model will be asked to hold; None for what it was made for. Matters to models whose
                rotary frequencies depend on it.
            progress: called with (stage, share done).

        Raises:
            SourceError: what is wrong with the model and the way out.
        """

    def original(self, spec: Spec) -> OriginalGraph | Pretrained | InMemory:
        """What `transom verify` compares the model with.

        Raises:
            SourceError: the files cannot be read.
        """

    def chat_template(self, spec: Spec) -> ChatTemplate | None:
        """The chat template without the tokenizer, which takes longer to read; None: there is none, or it is not known
        before the model is opened.

        Raises:
            SourceError: the files cannot be read.
        """
        return None

    def licence(self, spec: Spec) -> str | None:
        """The licence that the model itself names; None: it names none."""
        return None

    def contents(self, spec: Spec) -> Contents:
        """What the files hold, for `transom inspect`. Reads no weight."""
        return Contents()


def local_path(spec: Spec) -> Path | None:
    """The spec as a path, `~` expanded; None where it is no path at all."""
    if isinstance(spec, str):
        return Path(spec).expanduser() if spec else None
    if isinstance(spec, Path):
        return spec.expanduser()
    if hasattr(spec, "__fspath__"):
        raw = spec.__fspath__()
        return Path(raw.decode() if isinstance(raw, bytes) else raw).expanduser()
    return None


def begins_with(path: Path, magic: bytes) -> bool:
    """Whether the file begins with these bytes."""
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def content_hash(paths: Sequence[Path], progress: Progress | None = None) -> str:
    """The hash of the files' content, in order; remembered for each path, size and time of change."""
    from transom.artifacts import Cache

    cache = Cache.default()
    hashes = [cache.content_hash(path, progress) for path in paths]
    if len(hashes) == 1:
        return hashes[0]
    import hashlib

    return hashlib.blake2b(" ".join(hashes).encode(), digest_size=20).hexdigest()


def summarise(items: Iterable[str], most: int = 3) -> str:
    """`a, b, c and 12 more`."""
    names = list(items)
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
