"""The identity of a model: a fingerprint of its files, which is remembered until one of them changes.

On the warm path: a source, with its imports of ONNX, GGUF and model families, is imported only for changed files.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.artifacts import JsonStore, artifact_key
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
"""A file changed more recently than this could change again within the resolution of its timestamp."""
_MAX_FILES = 300
"""A folder with more entries does not belong to one model. The source then computes the fingerprint each time."""


@dataclass(frozen=True)
class ModelIdentity:
    """The model of one load."""

    path: str
    """Path of its file or directory, or the name of a model in memory."""
    content: str
    """Key of its content, under which the cache keeps its source, artifacts and failures."""
    fingerprint: str
    """The source's hash of its files, or the digest of its graph."""
    uses_plugin_operators: bool
    """Whether its graph may use operators of plugins."""
    sparsity: Sparsity
    """The requested policy, with the calibrated heads found beside the model or in the cache."""
    heads_from: str
    """Source of these heads; empty where there are none."""
    in_memory: SourceModel | None = None
    local: Path | None = None
    """The file or directory beside which calibrated heads are looked for."""


def identify(model: Any, state: LoadState, plugins: Plugins) -> ModelIdentity:
    """Identify a model by its content, without reading files whose fingerprint is remembered.

    Raises:
        SourceError: no source recognizes it, or it cannot be read.
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
    # A child process cannot read this model again; it gets the graph through the cache.
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
    """The policy, with the heads beside the model or in the cache if it has none; and the source of its heads."""
    policy = state.options.sparsity
    if policy.dense or policy.heads is not None:
        return policy, "given with the policy" if policy.heads else ""
    found = heads.local(local, state.cache, fingerprint)
    return (policy, "") if found is None else (policy.with_heads(found.heads), found.source)


def fingerprint_of(path: Path, cache: Cache) -> str:
    """The source's fingerprint of a file or directory.

    Raises:
        SourceError: no source recognizes it, or it cannot be read.
    """
    state = _state_of(path)
    if not state:
        return _fingerprint(path)
    where = artifact_key({"path": str(path.absolute()), "files": state, "transom": version()})
    # Not `cache.remember`, which warns about a read-only cache; loading warns when there is something to keep.
    notebook = JsonStore(cache.root / "remembered" / "fingerprints.json")
    known = notebook.recall(where, str)
    if known is not None:
        return known
    content = _fingerprint(path)
    newest = max(int(changed) for _, _, changed, _ in state)
    if time.time_ns() - newest > _SETTLED_NS:
        notebook.remember(where, content)
    return content


def _fingerprint(path: Path) -> str:
    """The source's fingerprint of a model that it can build: reading all of another one would be in vain."""
    source = resolve(path)
    source.require_supported(path)
    return source.fingerprint(path)


def _state_of(path: Path) -> list[list[str | int]]:
    """Path, size, modification time and inode of each file that may belong to a model; empty where unknown.

    A file that is not complete by itself may have its weights beside it.
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
        return []  # the source reports the error
    return [[name, s.st_size, s.st_mtime_ns, s.st_ino] for name, s in stats]


def _files_in(folder: Path) -> list[Path]:
    """The files in a folder and below; empty where there are more than `_MAX_FILES` entries."""
    entries = list(itertools.islice(folder.rglob("*"), _MAX_FILES + 1))
    return sorted(e for e in entries if not e.is_dir()) if len(entries) <= _MAX_FILES else []


def content_key(content: str, operators: str) -> str:
    """The key under which the source, its reference outputs, its artifacts and its failures are kept.

    Args:
        operators: `operators_identity` for a model whose graph may use operators of plugins; else empty.
    """
    parts = {"format": cached_source.FORMAT, "transom": version(), "content": content}
    return artifact_key({**parts, "operators": operators} if operators else parts)
