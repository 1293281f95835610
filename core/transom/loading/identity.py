"""Naming a model's content without reading it: the fingerprint, remembered while no file of the model changes.

On the warm path: a source is imported only when its files have changed, since reading models is what needs ONNX, GGUF
and the families.
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import TYPE_CHECKING

from transom.artifacts import Notebook, artifact_key
from transom.preparation.cached_source import FORMAT
from transom.preparation.jobs import version
from transom.sources import resolve

if TYPE_CHECKING:
    from transom.artifacts import Cache

SETTLED_NS = 2_000_000_000
"""A file that changed within this time could change again without its time showing it."""
MOST_FILES = 300
"""A folder with more entries is no model's own: its files are then looked at by the source each time."""


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
    if time.time_ns() - newest > SETTLED_NS:
        notebook.remember(where, content)
    return content


def _state_of(path: Path) -> list[list[str | int]]:
    """Name, size, time of change and inode of each file that may be part of a model; empty where that is not known.

    A GGUF file stands alone unless its name says that it is one of several; beside any other file may lie its weights.
    """
    try:
        if path.is_dir():
            files = _files_in(path)
        elif path.suffix.lower() == ".gguf" and "-of-" not in path.name:
            files = [path]
        else:
            files = _files_in(path.parent)
        stats = [(str(file), file.stat()) for file in files]
    except OSError:
        return []  # the source says what is wrong
    return [[name, s.st_size, s.st_mtime_ns, s.st_ino] for name, s in stats]


def _files_in(folder: Path) -> list[Path]:
    """The files in a folder and below; none where there are more than a model has."""
    entries = list(itertools.islice(folder.rglob("*"), MOST_FILES + 1))
    return sorted(e for e in entries if not e.is_dir()) if len(entries) <= MOST_FILES else []


def content_key(content: str, operators: str) -> str:
    """The key under which the source, its golden logits, its artifacts and its failures are kept.

    Args:
        operators: `operators_identity`, for a model whose graph may use what plugins bring; else empty.
    """
    parts = {"format": FORMAT, "transom": version(), "content": content}
    return artifact_key({**parts, "operators": operators} if operators else parts)


def may_use_operators(path: Path) -> bool:
    """Whether a model's graph may use a plugin's operators: an ONNX file may, what our own families build may not."""
    if path.is_dir():
        return next(path.rglob("*.onnx"), None) is not None
    return path.suffix.lower() != ".gguf"
