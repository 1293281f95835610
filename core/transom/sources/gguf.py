"""The `gguf` source: a file (or the parts of a split file) with settings, weights, tokenizer and chat template."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from transom.contract import Progress
from transom.errors import SourceError
from transom.graph.weights import Weight
from transom.models import Family, family_for_gguf
from transom.models.tensors import Tensors, gguf_names
from transom.models.values import Values
from transom.sources.architectures import OWN_GGUF, addition_in, refusal_of_gguf
from transom.sources.base import (
    Contents,
    Pretrained,
    Source,
    SourceModel,
    Spec,
    Texts,
    begins_with,
    content_hash,
    local_path,
    summarize,
)
from transom.sources.gguf_blocks import weight_of
from transom.sources.gguf_file import MAGIC, GgufFile, general_settings, is_first_part, open_gguf, parts_of

if TYPE_CHECKING:
    from transom.text.chat_template import ChatTemplate


class GgufSource(Source):
    """Loads `.gguf` files, and files of any name that begin with the GGUF magic number."""

    kind = "gguf"

    def matches(self, spec: Spec) -> bool:
        path = local_path(spec)
        if path is None:
            return False
        if path.is_dir():
            return bool(_models_in(path)) and not any(path.glob("*.safetensors"))
        return path.is_file() and (path.suffix.lower() == ".gguf" or begins_with(path, MAGIC))

    def fingerprint(self, spec: Spec) -> str:
        return content_hash(parts_of(gguf_path(spec)))

    def open(self, spec: Spec, *, context: int | None = None, progress: Progress | None = None) -> SourceModel:
        path = gguf_path(spec)
        if progress is not None:
            progress("read", None)
        file = open_gguf(path)
        family, settings, checkpoint, tensors = _headers(file, path)
        graph = family.build(family.from_gguf(settings, tensors, context), tensors)
        notes = [*graph.notes, *checkpoint.notes()]
        if left := tensors.unused():
            notes.append(f"{len(left)} tensors of the file are not used: {summarize(left)}")
        graph.notes = tuple(notes)
        tokenizer, template, generation = _text(file)
        name = file.metadata.get("general.name")
        return SourceModel(
            graph,
            tokenizer,
            template,
            generation,
            name=name if isinstance(name, str) and name else path.stem,
            kind=self.kind,
            notes=notes,
        )

    def require_supported(self, spec: Spec) -> None:
        path = gguf_path(spec)
        general = general_settings(path)
        if (addition := addition_in(general, path)) is not None:
            raise addition
        architecture = general.get("general.architecture")
        if isinstance(architecture, str) and architecture not in OWN_GGUF:
            raise refusal_of_gguf(architecture, path)

    def original(self, spec: Spec) -> Pretrained:
        from transom.sources.gguf_original import original

        return original(gguf_path(spec))

    def chat_template(self, spec: Spec) -> ChatTemplate | None:
        from transom.text.from_gguf import chat_template_from_gguf

        return chat_template_from_gguf(open_gguf(gguf_path(spec)).metadata, None)

    def license(self, spec: Spec) -> str | None:
        found = open_gguf(gguf_path(spec)).metadata.get("general.license")
        return found if isinstance(found, str) and found else None

    def contents(self, spec: Spec) -> Contents:
        file = open_gguf(gguf_path(spec))
        tensors = tuple((t.type, math.prod(t.shape), t.data.nbytes) for t in file.tensors.values())
        architecture = str(file.metadata.get("general.architecture", ""))
        stated = {what: file.metadata.get(f"{architecture}.{key}") for what, key in _SIZES}
        vocabulary = file.metadata.get("tokenizer.ggml.tokens")
        if isinstance(vocabulary, list):
            stated["vocabulary"] = len(vocabulary)
        return Contents(architecture, tensors, {what: n for what, n in stated.items() if isinstance(n, int)})

    def texts(self, spec: Spec) -> Texts:
        return _text(open_gguf(gguf_path(spec)))


_SIZES = (
    ("layers", "block_count"),
    ("hidden size", "embedding_length"),
    ("vocabulary", "vocab_size"),
    ("context", "context_length"),
)
"""The sizes that `inspect` shows, and their keys in the metadata behind the architecture's name."""


def _headers(file: GgufFile, path: Path) -> tuple[Family, Values, GgufCheckpoint, Tensors]:
    """Family, settings, checkpoint and tensors of a file. Reads no weight.

    Raises:
        SourceError: no family builds the architecture, or the file is a part of a model or an addition to one.
    """
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise SourceError(
            f"{path} does not name its architecture (general.architecture)",
            "Convert the model again with a current llama.cpp",
        )
    if (addition := addition_in(file.metadata, path)) is not None:
        raise addition
    family = family_for_gguf(architecture)
    if family is None:
        raise refusal_of_gguf(architecture, path)
    checkpoint = GgufCheckpoint(file)
    tensors = Tensors(checkpoint, gguf_names(family.gguf_names))
    return family, Values(file.metadata, str(path), f"{architecture}."), checkpoint, tensors


class GgufCheckpoint:
    """The tensors of a GGUF file by its own names, as weights."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.where = str(file.paths[0])
        self._notes: Counter[tuple[str, str]] = Counter()

    @functools.cached_property
    def weights_hash(self) -> str:
        return content_hash(self.file.paths)

    def names(self) -> Iterable[str]:
        return self.file.tensors

    def find(self, name: str) -> Weight | None:
        tensor = self.file.tensors.get(name)
        if tensor is None:
            return None
        weight, note = weight_of(tensor, self.where)
        if note:
            self._notes[(tensor.type, note)] += 1
        return weight

    def notes(self) -> list[str]:
        """One line for each type of tensor that was changed."""
        return [f"{count} {kind} tensors: {note}" for (kind, note), count in sorted(self._notes.items())]


def _text(file: GgufFile) -> Texts:
    from transom.text.defaults import defaults_from_gguf
    from transom.text.from_gguf import chat_template_from_gguf, tokenizer_from_gguf

    metadata = file.metadata
    has_vocabulary = metadata.get("tokenizer.ggml.model") not in (None, "none", "no_vocab")
    tokenizer = tokenizer_from_gguf(metadata) if has_vocabulary else None
    return Texts(tokenizer, chat_template_from_gguf(metadata, tokenizer), defaults_from_gguf(metadata, tokenizer))


def _models_in(directory: Path) -> list[Path]:
    """The GGUF models of a directory: the first part of split models, and no image projectors."""
    files = sorted(p for p in directory.iterdir() if p.suffix.lower() == ".gguf")
    return [p for p in files if is_first_part(p) and not p.name.lower().startswith("mmproj")]


def gguf_path(spec: Spec) -> Path:
    path = local_path(spec)
    if path is None:
        raise SourceError(f"{spec!r} is not the path of a GGUF file")
    if not path.is_dir():
        return path
    models = _models_in(path)
    if len(models) != 1:
        raise SourceError(
            f"The directory {path} holds {len(models)} GGUF models: {summarize(p.name for p in models)}",
            f"Give the path of one of them, for example {path / models[0].name}" if models else "",
        )
    return models[0]
