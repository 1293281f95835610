"""The artifact cache: what compiling made, kept until it is stale, and never believed without a check.

One `Cache` is one folder on disk:

    artifacts/<key>/     a compiled model: files/, manifest.json (written last), verdicts.json, verified.json
    sources/<key>/       a prepared source: tokenizer, chat template, generation defaults
    golden/<key>/        the reference's logits that the self-check compares with
    scratch/<key>/       the lasting folder a backend gets in `load`
    remembered/*.json    measured choices and verdicts; remembered/hashes.json memoises content hashes
    building/ trash/     entries that are being made or removed; left-overs of killed processes are swept
    locks/               one lock file per key that is being built

Loading never fails because of the cache: what is corrupt, foreign or unreadable counts as absent with one log line,
and where nothing can be written the run goes on in a temporary folder with one warning. Only the functions that a
person calls to change the cache (`prune`, `clear`, `require_writable`) raise `CacheError`.

This package knows nothing of graphs, models or backends, and imports only what a warm start can afford.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from transom.artifacts.cache import Blobs, Cache, Origin, Overflow, Slot, StoredArtifact
from transom.artifacts.entries import Entry, FileRecord, Manifest, Verify
from transom.artifacts.files import hash_file
from transom.artifacts.keys import artifact_key, content_hash, parse_size
from transom.artifacts.notebook import Notebook

if TYPE_CHECKING:
    from transom.artifacts.housekeeping import Item, KindStats, Removed, Stats

__all__ = [
    "Blobs",
    "Cache",
    "Entry",
    "FileRecord",
    "Item",
    "KindStats",
    "Manifest",
    "Notebook",
    "Origin",
    "Overflow",
    "Removed",
    "Slot",
    "Stats",
    "StoredArtifact",
    "Verify",
    "artifact_key",
    "content_hash",
    "hash_file",
    "parse_size",
]


def __getattr__(name: str) -> object:
    if name in ("Item", "KindStats", "Removed", "Stats"):  # a warm start does without housekeeping
        from transom.artifacts import housekeeping

        return getattr(housekeeping, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
