"""The identity of a model: a fingerprint of its files, which is remembered while none of them changes.

On the warm path: a source is imported only when its files have changed, since reading models is what needs ONNX, GGUF
and the families.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.artifacts import Notebook, artifact_key
from transom.preparation import cached_source, heads
from transom.preparation.jobs import version
from transom.preparation.plugin_operators import explaining_rejected, operators_identity, register_operators
from transom.sources import SourceModel, local_path, resolve
from transom.sources.layout import may_use_operators, stands_alone
from transom.sparsity import Sparsity

if TYPE_CHECKING:
    from transom.artifacts import Cache
    from transom.loading.load_state import LoadState
    from transom.plugins import Plugins

_SETTLED_NS = 2_000_000_000
"""A file that changed within this time could change again without its time showing it."""
_MAX_FILES = 300
"""A folder with more entries is no model's own: its files are then looked at by the source each time."""


@dataclass(frozen=True)
class ModelIdentity:
    """The model of one load."""

    path: str
    """Of its file or directory; the name of a model that exists in memory only."""
    content: str
    """Key of its content, under which the cache keeps what belongs to it."""
    fingerprint: str
    """The source's hash of its files, or the digest of its graph."""
    uses_plugin_operators: bool
    """Whether its graph may use operators that plugins bring."""
    sparsity: Sparsity
    """The policy asked for, with the heads that lie beside the model or in the cache."""
    heads_from: str
    """Where these heads come from; empty where there are none."""
    in_memory: SourceModel | None = None
    local: Path | None = None
    """The file or directory beside which calibrated heads may lie."""


def identify(model: Any, state: LoadState, plugins: Plugins) -> ModelIdentity:
    """Find the source and name its content, without reading it where the content is known already.

    Raises:
        SourceError: no source knows it, or it cannot be read.
    """
    path = local_path(model)
    if path is None:
        return _identify_in_memory(model, state, plugins)
    fingerprint = fingerprint_of(path, state.cache)
    uses_plugin_operators = bool(plugins.bringing_operators()) and may_use_operators(path)
    content = content_key(fingerprint, operators_identity(plugins) if uses_plugin_operators else "")
    absolute = path.absolute()
    sparsity, heads_from = _with_heads(state, absolute, fingerprint)
    return ModelIdentity(
        str(absolute), content, fingerprint, uses_plugin_operators, sparsity, heads_from, local=absolute
    )  # fmt: skip


def _identify_in_memory(model: Any, state: LoadState, plugins: Plugins) -> ModelIdentity:
    source = resolve(model)
    register_operators(plugins)  # before a graph that uses them is read
    # A child process cannot read this model again: its graph goes there through the cache.
    with explaining_rejected(plugins):
        opened = source.open(model, context=state.options.for_backend["context"], progress=state.progress)
    fingerprint = opened.graph.digest()
    content = content_key(fingerprint, operators_identity(plugins))
    sparsity, heads_from = _with_heads(state, None, fingerprint)
    state.held.append(cached_source.keep(state.cache, content, opened))
    uses_plugin_operators = bool(plugins.bringing_operators())
    return ModelIdentity(
        opened.name, content, fingerprint, uses_plugin_operators, sparsity, heads_from, in_memory=opened
    )


def _with_heads(state: LoadState, local: Path | None, fingerprint: str) -> tuple[Sparsity, str]:
    """The policy with the heads that lie beside the model or in the cache, where it has none of its own; and where its
    heads come from."""
    policy = state.options.sparsity
    if policy.dense or policy.heads is not None:
        return policy, "given with the policy" if policy.heads else ""
    found = heads.local(local, state.cache, fingerprint)
    return (policy, "") if found is None else (policy.with_heads(found.heads), found.source)


def fingerprint_of(path: Path, cache: Cache) -> str:
    """The source's name for the content of a file or directory.

    Raises:
        SourceError: no source knows it, or it cannot be read.
    """
    state = _state_of(path)
    if not state:
        return resolve(path).fingerprint(path)
    where = artifact_key({"path": str(path.absolute()), "files": state, "transom": version()})
    # A notebook of its own: where the cache cannot be written, loading says so when there is something to keep.
    notebook = Notebook(cache.root / "remembered" / "fingerprints.json")
    known = notebook.recall(where)
    if isinstance(known, str):
        return known
    content = resolve(path).fingerprint(path)
    newest = max(int(changed) for _, _, changed, _ in state)
    if time.time_ns() - newest > _SETTLED_NS:
        notebook.remember(where, content)
    return content


def _state_of(path: Path) -> list[list[str | int]]:
    """Name, size, time of change and inode of each file that may be part of a model; empty where that is not known.

    Beside a file that does not stand alone may lie its weights.
    """
    try:
        if path.is_dir():
            files = _files_in(path)
        elif stands_alone(path):
            files = [path]
        else:
            files = _files_in(path.parent)
        stats = [(str(file), file.stat()) for file in files]
    except OSError:
        return []  # the source says what is wrong
    return [[name, s.st_size, s.st_mtime_ns, s.st_ino] for name, s in stats]


def _files_in(folder: Path) -> list[Path]:
    """The files in a folder and below; none where there are more than a model has."""
    entries = list(itertools.islice(folder.rglob("*"), _MAX_FILES + 1))
    return sorted(e for e in entries if not e.is_dir()) if len(entries) <= _MAX_FILES else []


def content_key(content: str, operators: str) -> str:
    """The key under which the source, its golden logits, its artifacts and its failures are kept.

    Args:
        operators: `operators_identity`, for a model whose graph may use what plugins bring; else empty.
    """
    parts = {"format": cached_source.FORMAT, "transom": version(), "content": content}
    return artifact_key({**parts, "operators": operators} if operators else parts)
