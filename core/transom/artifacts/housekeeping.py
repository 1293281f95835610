"""Listing, evicting and sweeping: what the cache contains, what to remove first, what killed processes left behind.

Not imported on a warm start.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.artifacts.entries import SCRATCH, ArtifactFacts, CorruptEntry, EntryManifest, EntryStore
from transom.artifacts.files import MARK, delete, folder_size, is_locked, remove_unless_locked

if TYPE_CHECKING:
    from transom.contract import Progress

KINDS = ("artifacts", "sources", "golden")
_ORPHAN_SECONDS = 3600.0


@dataclass(frozen=True)
class Item:
    """One entry of the cache, for display."""

    kind: str
    """`"artifacts"`, `"sources"`, `"golden"`, or `"scratch"` for a scratch folder without its artifact."""
    key: str
    path: Path
    bytes: int
    """Size on disk, including the scratch folder."""
    created: float
    """Seconds since 1970; 0 when unknown."""
    last_used: float
    in_use: bool
    facts: Mapping[str, Any]
    """From the manifest: for an artifact its source, backend, device, options, requires and notes."""
    problem: str = ""
    """Why the entry will not be used; empty if its manifest is valid."""


@dataclass(frozen=True)
class Removed:
    """The result of `prune` or `clear`."""

    entries: int
    bytes: int
    kept: tuple[str, ...] = ()
    """"kind/key" of entries that should have been removed but are in use or cannot be deleted."""


@dataclass(frozen=True)
class Verified:
    """The result of `verify`."""

    entries: int
    """How many are intact."""
    bytes: int
    corrupt: tuple[str, ...] = ()
    """"kind/key" of entries that were not. They are removed where the cache can be written."""


@dataclass(frozen=True)
class KindStats:
    entries: int
    bytes: int


@dataclass(frozen=True)
class Stats:
    root: Path
    exists: bool
    bytes: int
    """Size of all entries and their scratch folders."""
    limit_bytes: int | None
    """None: no limit."""
    free_bytes: int | None
    """Free space on the disk of the cache; None if unknown."""
    kinds: Mapping[str, KindStats]


def items(root: Path, *, usage: bool = True) -> list[Item]:
    """Every entry, least recently used first. Without `usage`, `in_use` is False."""
    found = [_item(root, kind, folder, usage) for kind in KINDS for folder in EntryStore(root, kind).folders()]
    artifacts = {item.key for item in found if item.kind == "artifacts"}
    for folder in EntryStore(root, SCRATCH).folders():
        if folder.name not in artifacts:
            found.append(_item(root, SCRATCH, folder, usage))
    return sorted(found, key=lambda item: (item.last_used, item.kind, item.key))


def _item(root: Path, kind: str, folder: Path, usage: bool) -> Item:
    size = folder_size(folder)
    if kind == "artifacts":
        size += folder_size(root / SCRATCH / folder.name)
    created, facts, problem = 0.0, {}, ""
    if kind != SCRATCH:
        try:
            manifest = EntryManifest.read(folder, _facts_of(kind))
            created, facts = manifest.created, dict(manifest.facts)
            if manifest.key != folder.name:
                problem = f"it belongs to the key {manifest.key}"
        except CorruptEntry as error:
            problem = str(error)
    used = _modified(folder / MARK) or _modified(folder)
    return Item(kind, folder.name, folder, size, created, used, usage and is_locked(folder), facts, problem)


def _facts_of(kind: str) -> type[Any]:
    return ArtifactFacts if kind == "artifacts" else dict[str, object]


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def verify(root: Path, progress: Progress | None = None) -> Verified:
    """Compare the whole content of every entry with its hashes, and remove those that differ. This is not a use.

    Args:
        progress: called with ("verify", share of the bytes).
    """
    entries, size, corrupt = 0, 0, []
    all_items = [item for item in items(root, usage=False) if item.kind != SCRATCH]
    total = sum(item.bytes for item in all_items) or 1
    seen = 0
    for item in all_items:
        entry = EntryStore(root, item.kind).lookup(item.key, facts=_facts_of(item.kind), verify="full")
        if entry is not None:
            entries, size = entries + 1, size + item.bytes
            with suppress(OSError):  # a cache that cannot be written notes no use
                os.utime(item.path / MARK, (item.last_used, item.last_used))
            entry.release()
        else:
            corrupt.append(f"{item.kind}/{item.key}")
        seen += item.bytes
        if progress is not None:
            progress("verify", seen / total)
    return Verified(entries, size, tuple(corrupt))


def evict(root: Path, *, limit: int | None = None, unused_since: float | None = None) -> Removed:
    """Remove entries, least recently used first, until all fit in `limit` bytes; entries in use stay.

    With `unused_since` (seconds since 1970), entries last used before are removed too.
    """
    all_items = items(root, usage=False)
    total = sum(item.bytes for item in all_items)
    entries, size, kept = 0, 0, []
    for item in all_items:
        old = unused_since is not None and item.last_used < unused_since
        if not old and (limit is None or total - size <= limit):
            continue
        if _remove(root, item):
            entries += 1
            size += item.bytes
        elif item.path.exists():
            kept.append(f"{item.kind}/{item.key}")
    return Removed(entries, size, tuple(kept))


def _remove(root: Path, item: Item) -> bool:
    if item.kind == SCRATCH and (root / "artifacts" / item.key).exists():
        return False  # its artifact has been built since the list was made
    return EntryStore(root, item.kind).remove(item.key)


def sweep(root: Path) -> int:
    """Remove what killed processes left in `building/` and `trash/`. Returns the bytes freed."""
    freed = 0
    for folder in _children(root / "building"):
        size = folder_size(folder)
        if remove_unless_locked(folder, root / "trash", unmarked_age=_ORPHAN_SECONDS):
            freed += size
    for folder in _children(root / "trash"):
        freed += folder_size(folder)
        delete(folder)
    for parent in (root / "remembered", *(f for kind in KINDS for f in EntryStore(root, kind).folders())):
        for file in _children(parent):
            half_written = file.name.startswith(".") and file.name != MARK
            if half_written and time.time() - _modified(file) > _ORPHAN_SECONDS:
                freed += folder_size(file)
                delete(file)
    return freed


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def stats(root: Path, limit: int | None) -> Stats:
    import shutil

    found = items(root, usage=False)
    kinds = {
        kind: KindStats(len(of := [item for item in found if item.kind == kind]), sum(item.bytes for item in of))
        for kind in (*KINDS, SCRATCH)
    }
    try:
        existing = next(p for p in (root, *root.parents) if p.exists())
        free: int | None = shutil.disk_usage(existing).free
    except OSError:
        free = None
    return Stats(root, root.is_dir(), sum(item.bytes for item in found), limit, free, kinds)
