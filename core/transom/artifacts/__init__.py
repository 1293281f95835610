"""The artifact cache: compiled models on disk, kept until they are stale and checked each time they are opened.

One `Cache` is one folder on disk:

    artifacts/<key>/     a compiled model: files/, manifest.json (written last), verdicts.json, verified.json
    sources/<key>/       a prepared source: tokenizer, chat template, generation defaults
    golden/<key>/        the reference logits that the self-check compares with
    scratch/<key>/       the persistent folder that a backend gets in `load`
    remembered/*.json    measured choices and verdicts; remembered/hashes.json memoizes content hashes
    building/ trash/     entries that are being written or removed; what killed processes left here is swept
    running/             a folder per process that has models open, see transom.loading.crashes; a file per plugin that
                         is being imported, see transom.plugin_trials
    locks/               one lock file per key that is being built

Loading never fails because of the cache. A corrupt, foreign or unreadable entry counts as absent and is logged in one
line; where nothing can be written, the run continues in a temporary folder with one warning. Only the functions that a
user calls to change the cache (`prune`, `clear`, `require_writable`) raise `CacheError`.

This package does not know graphs, models or backends, and imports only what a warm start can afford.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from transom.artifacts.cache import ArtifactBuild, BlobStore, Cache, Origin, StoredArtifact, TemporaryCache
from transom.artifacts.entries import Entry, EntryManifest, FileRecord, Verify
from transom.artifacts.files import hash_file
from transom.artifacts.json_store import JsonStore
from transom.artifacts.keys import artifact_key, content_hash, parse_size

if TYPE_CHECKING:
    from transom.artifacts.housekeeping import Item, KindStats, Removed, Stats, Verified

__all__ = [
    "ArtifactBuild",
    "BlobStore",
    "Cache",
    "Entry",
    "EntryManifest",
    "FileRecord",
    "Item",
    "JsonStore",
    "KindStats",
    "Origin",
    "Removed",
    "Stats",
    "StoredArtifact",
    "TemporaryCache",
    "Verified",
    "Verify",
    "artifact_key",
    "content_hash",
    "hash_file",
    "parse_size",
]


def __getattr__(name: str) -> object:
    if name in ("Item", "KindStats", "Removed", "Stats", "Verified"):  # a warm start does not need housekeeping
        from transom.artifacts import housekeeping

        return getattr(housekeeping, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
