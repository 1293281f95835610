"""The cache as the rest of Transom uses it: look an artifact up, build it once, keep it, survive a failing disk."""

from __future__ import annotations

import errno
import logging
import os
import weakref
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from transom.artifacts.entries import (
    SCRATCH,
    VERDICTS,
    ArtifactFacts,
    Entry,
    EntryStore,
    EntryWriter,
    Ingredients,
    Verify,
)
from transom.artifacts.files import delete, is_left_over, lock_folder, make_private, unique
from transom.artifacts.json_store import JsonStore
from transom.artifacts.keys import canonical, check_key, content_hash, parse_size
from transom.contract import Artifact
from transom.errors import CacheError

if TYPE_CHECKING:
    from transom.artifacts.housekeeping import Item, Removed, Stats, Verified
    from transom.contract import Device, Progress

T = TypeVar("T")

DEFAULT_LIMIT = 20 * 1000**3

_log = logging.getLogger("transom.artifacts")
_TAG = b"Signature: 8a477f597d28d172789f06886806bc55\n# Made by transom; backup programs may leave it out.\n"
_TEMPORARY_PREFIX = "transom-overflow-"


@dataclass(frozen=True)
class Origin:
    """Where an artifact comes from: everything in its manifest that is not in `contract.Artifact`."""

    source: str
    """The model's name or path, for display."""
    backend: str
    backend_version: str
    """Version of the distribution that contains the backend."""
    device: Mapping[str, str] = field(default_factory=dict)
    """`kind`, `id`, `arch`, `identity`, `name`."""
    drivers: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, object] = field(default_factory=dict)
    ingredients: Ingredients = field(default_factory=Ingredients)

    @classmethod
    def on(
        cls,
        device: Device,
        *,
        source: str,
        backend: str,
        backend_version: str,
        options: Mapping[str, object] | None = None,
        ingredients: Ingredients | None = None,
    ) -> Origin:
        """The origin of an artifact compiled for `device`."""
        named = {name: str(getattr(device, name)) for name in ("kind", "id", "arch", "identity", "name")}
        return cls(source, backend, backend_version, named, dict(device.drivers), options or {}, ingredients or {})


class StoredArtifact:
    """An open artifact of the cache. Not evicted until `release`, the end of a `with`, or its garbage collection."""

    def __init__(self, cache: Cache, entry: Entry, *, temporary: bool) -> None:
        self._cache = cache
        self._entry = entry
        self.temporary = temporary
        """Whether the cache could not keep it, so that it is deleted when this process ends."""
        facts: Any = dict(entry.manifest.facts)
        self.artifact = Artifact(entry.files, facts.pop("requires"), tuple(facts.pop("notes")))
        self.origin = Origin(**facts)

    @property
    def key(self) -> str:
        return self._entry.key

    @property
    def path(self) -> Path:
        return self._entry.path

    @property
    def bytes(self) -> int:
        return self._entry.manifest.bytes

    @property
    def scratch(self) -> Path:
        """The folder for `Backend.load`: created on demand, kept as long as the artifact."""
        root = self.path.parent.parent
        try:
            folder = root / SCRATCH / self.key
            make_private(folder)
        except OSError as error:
            folder = self._cache._temporary_cache(error).root / SCRATCH / self.key
            make_private(folder)
        return folder

    def verdict(self, where: str, kind: type[T]) -> T | None:
        """The verdict recorded for this runtime identity (device identity, driver and SDK versions), or None; see
        `JsonStore.recall`."""
        return self._verdicts.recall(where, kind)

    def record_verdict(self, where: str, verdict: object) -> None:
        """Store the self-check's verdict (JSON types) beside the artifact; it is removed together with the artifact."""
        self._cache._remember(self._verdicts, where, verdict)

    @property
    def verdicts(self) -> dict[str, object]:
        return self._verdicts.all()

    @property
    def _verdicts(self) -> JsonStore:
        return self._cache._json_store(self.path / VERDICTS)

    def discard(self, reason: str) -> None:
        """Remove it and its scratch folder, as after the verdict "rebuild", and log the reason."""
        self._entry.discard(reason)

    def remove(self) -> bool:
        """Close it and remove it and its scratch folder from the cache, as when its files have been moved elsewhere.

        Returns False when it stays, because another process uses it or it cannot be deleted.
        """
        return self._entry.remove()

    def release(self) -> None:
        """Allow eviction. Call it when the session that uses the files is closed."""
        self._entry.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


class ArtifactBuild:
    """The build of one artifact, while this process holds the lock of its key."""

    def __init__(self, cache: Cache, key: str, found: StoredArtifact | None) -> None:
        self._cache = cache
        self._key = key
        self._writer: EntryWriter | None = None
        self.found = found
        """The artifact, if another process finished it while this one waited; then there is nothing left to do."""

    @property
    def work(self) -> Path:
        """A folder for the compiler's files. `store` moves the files in it into the entry instead of copying them."""
        if self._writer is None:
            self._writer = self._cache._begin("artifacts", self._key)
        return self._writer.work

    def outside(self, error: OSError) -> Path:
        """A new work folder outside the cache, after writing into `work` failed with `error` (a full disk)."""
        self._abandon()
        self._writer = self._cache._temporary_cache(error).entries("artifacts").begin(self._key)
        return self._writer.work

    def no_room(self, error: OSError, second: OSError) -> CacheError:
        """The error to raise after writing into `work` failed with `error`, and into `outside` with `second`."""
        return self._cache._no_room(error, second)

    def store(self, artifact: Artifact, origin: Origin, progress: Progress | None = None) -> StoredArtifact:
        """Store an artifact. When the cache cannot be written, store it in a temporary folder for this run and warn.

        Raises CacheError when that folder has no space either, ValueError for a file name that points outside the
        artifact, TypeError when the origin does not consist of JSON types.
        """
        facts = {name: canonical(value) for name, value in vars(origin).items()}
        facts |= {"requires": canonical(artifact.requires), "notes": canonical(tuple(artifact.notes))}
        writer = self._writer or self._cache._begin("artifacts", self._key)
        self._writer = None
        entry = self._cache._commit(writer, artifact.files, facts, progress)
        return self._cache._stored(entry)

    def _abandon(self) -> None:
        if self._writer is not None:
            self._writer.abandon()
            self._writer = None


class BlobStore:
    """Named blobs under a key, such as prepared sources and reference logits. Written as a whole or not at all."""

    def __init__(self, cache: Cache, kind: str) -> None:
        self._cache = cache
        self._kind = kind

    def lookup(self, key: str, *, facts: type[Any] = dict[str, object], verify: Verify = "auto") -> Entry | None:
        """The open entry (`read(name)`, `files`, `manifest.facts`), or None; see `EntryStore.lookup`."""
        return self._cache._lookup(self._kind, key, facts, verify, None)

    def write(
        self, key: str, blobs: Mapping[str, bytes | str | Path], facts: Mapping[str, object] | None = None
    ) -> Entry:
        """Store blobs (str as UTF-8) and facts (JSON types), replacing the key's old entry. Raises as
        `ArtifactBuild.store`."""
        files = {name: blob.encode() if isinstance(blob, str) else blob for name, blob in blobs.items()}
        writer = self._cache._begin(self._kind, key)
        return self._cache._commit(writer, files, {k: canonical(v) for k, v in (facts or {}).items()}, None)


class Cache:
    """One cache folder. Creating the object does not touch the disk.

    If the folder cannot be written (read-only, full, not a directory), its entries are still read; new ones are written
    to a temporary folder of this process, and `warnings` gets one sentence about it.

    Args:
        root: the folder.
        limit: bytes to keep, None for no limit. The least recently used entries are evicted first.
    """

    def __init__(self, root: str | Path, *, limit: int | None = DEFAULT_LIMIT) -> None:
        self.root = Path(os.path.abspath(Path(root).expanduser()))
        self.limit = limit
        self.warnings: list[str] = []
        """For the report: at most one sentence, why this run cannot write to the cache."""
        self.sources = BlobStore(self, "sources")
        self.reference_outputs = BlobStore(self, "golden")
        self._json_stores: dict[Path, JsonStore] = {}
        self._temporary: TemporaryCache | None = None

    @classmethod
    def default(cls) -> Cache:
        """The cache of `TRANSOM_CACHE` (else the user's cache directory) and `TRANSOM_CACHE_SIZE` (else 20 GB).

        One object per process for the same settings. Raises OptionError if the size cannot be parsed.
        """
        size = os.environ.get("TRANSOM_CACHE_SIZE", "").strip()
        limit = parse_size(size, "TRANSOM_CACHE_SIZE") if size else DEFAULT_LIMIT
        root = _default_root()
        return _OPENED.setdefault((root, limit), Cache(root, limit=limit))

    # --- artifacts ---

    def lookup(self, key: str, *, verify: Verify = "auto", progress: Progress | None = None) -> StoredArtifact | None:
        """The open artifact, marked as used now, or None. A corrupt or foreign one is removed and logged."""
        entry = self._lookup("artifacts", key, ArtifactFacts, verify, progress)
        return None if entry is None else self._stored(entry)

    @contextmanager
    def building(self, key: str, progress: Progress | None = None) -> Iterator[ArtifactBuild]:
        """Build an artifact while no other process builds it. Check `found` of the result first.

        While another process builds the same key, `progress("wait", None)` is called about four times a second; it
        may raise to give up. A killed process does not block others. Leaving the `with` without `store` removes
        what was written.
        """
        from transom.artifacts import housekeeping

        check_key(key)
        with self._lock(key, progress):
            housekeeping.sweep(self.root)
            build = ArtifactBuild(self, key, self.lookup(key, progress=progress))
            try:
                yield build
            finally:
                build._abandon()

    # --- hashes and facts ---

    def content_hash(self, path: Path, progress: Progress | None = None) -> str:
        """The hash of a file's content, memoized by path, size, modification time and inode. Raises SourceError."""
        return content_hash(path, self._remembered("hashes"), progress)

    def recall(self, name: str, key: str, kind: type[T]) -> T | None:
        """The value remembered in the store `name`, or None; see `JsonStore.recall`."""
        return self._remembered(name).recall(key, kind)

    def remember(self, name: str, key: str, value: object) -> None:
        """Remember a value (JSON types) for later processes, or only for this one when the cache cannot be written."""
        self._remember(self._remembered(name), key, value)

    # --- housekeeping ---

    def list(self) -> list[Item]:
        """Every entry, least recently used first."""
        from transom.artifacts import housekeeping

        return housekeeping.items(self.root)

    def stats(self) -> Stats:
        """Entries and bytes by kind, the limit, and the free space on the disk."""
        from transom.artifacts import housekeeping

        return housekeeping.stats(self.root, self.limit)

    def verify(self, progress: Progress | None = None) -> Verified:
        """Compare the whole content of every entry with its hashes; entries that differ are removed.

        Opening an entry does this only the first time and after a change, and compares samples otherwise.
        """
        from transom.artifacts import housekeeping

        return housekeeping.verify(self.root, progress)

    def sweep(self) -> None:
        """Remove what killed processes left half-written, as `building` and `prune` do too. Never raises OSError."""
        from transom.artifacts import housekeeping

        housekeeping.sweep(self.root)

    def prune(self, *, limit: int | None = None, unused_since: float | None = None) -> Removed:
        """Remove left-overs, then the least recently used entries until the cache fits in `limit` (default: its own).

        Entries last used before `unused_since` (seconds since 1970) are removed in any case; entries in use stay.
        Raises CacheError when the cache cannot be written.
        """
        from transom.artifacts import housekeeping

        if not os.path.lexists(self.root):
            return housekeeping.Removed(0, 0)
        self.require_writable()
        swept = housekeeping.sweep(self.root)
        done = housekeeping.evict(self.root, limit=self.limit if limit is None else limit, unused_since=unused_since)
        return housekeeping.Removed(done.entries, done.bytes + swept, done.kept)

    def clear(self) -> Removed:
        """Remove every entry that is not in use and everything remembered. Raises CacheError as `prune` does."""
        done = self.prune(unused_since=float("inf"))
        for store in (self.root / "remembered").glob("*.json"):
            delete(store)
        self._json_stores.clear()
        return done

    def unwritable(self) -> OSError | None:
        """Create the folder and try to write to it. Returns the error, or None."""
        probe = self.root / f".{unique('probe')}"
        try:
            self._make_root()
            probe.write_bytes(b"transom")
            probe.unlink()
        except OSError as error:
            delete(probe)
            return error
        return None

    def require_writable(self) -> None:
        """Raise CacheError, with the cause and a fix, if the folder cannot be written."""
        if (error := self.unwritable()) is not None:
            raise CacheError(f"The cache folder {self.root} cannot be written: {_reason(error)}", _FIX) from error

    def keeps_nothing(self, error: OSError | None = None) -> str:
        """The warning of a run that continues outside this cache.

        Args:
            error: why writing failed; None if something that was written has disappeared.
        """
        why = "could not keep the compiled model" if error is None else f"cannot be written ({_reason(error)})"
        return (
            f"The cache {self.root} {why}: what this run makes is kept in a temporary folder and deleted when the "
            f"process ends. {_FIX}."
        )

    # --- shared by the classes of this file ---

    def _lookup(self, kind: str, key: str, facts: type[Any], verify: Verify, progress: Progress | None) -> Entry | None:
        entry = EntryStore(self.root, kind).lookup(key, facts=facts, verify=verify, progress=progress)
        if entry is None and self._temporary is not None:
            entry = self._temporary.entries(kind).lookup(key, facts=facts, verify=verify, progress=progress)
        return entry

    def _stored(self, entry: Entry) -> StoredArtifact:
        return StoredArtifact(self, entry, temporary=not entry.path.is_relative_to(self.root))

    def _begin(self, kind: str, key: str) -> EntryWriter:
        try:
            self._make_root()
            return EntryStore(self.root, kind).begin(key)
        except OSError as error:
            return self._begin_outside(kind, key, error)

    def _begin_outside(self, kind: str, key: str, error: OSError) -> EntryWriter:
        temporary = self._temporary_cache(error)
        try:
            return temporary.entries(kind).begin(key)
        except OSError as second:
            raise self._no_room(error, second) from second

    def _commit(
        self,
        writer: EntryWriter,
        files: Mapping[str, bytes | Path],
        facts: Mapping[str, object],
        progress: Progress | None,
    ) -> Entry:
        try:
            try:
                entry = writer.commit(files, facts, progress)
            except OSError as error:
                if writer.store.root != self.root:
                    raise self._no_room(error, error) from error
                entry = self._commit_outside(writer, files, facts, error)
            else:
                if writer.store.root == self.root:
                    self._make_room()
        finally:
            writer.abandon()
        return entry

    def _commit_outside(
        self, failed: EntryWriter, files: Mapping[str, bytes | Path], facts: Mapping[str, object], error: OSError
    ) -> Entry:
        writer = self._begin_outside(failed.store.kind, failed.key, error)
        try:
            here = {name: failed.where(f) if isinstance(f, Path) else f for name, f in files.items()}
            return writer.commit(here, facts)
        except OSError as second:
            raise self._no_room(error, second) from second
        finally:
            writer.abandon()

    def _no_room(self, error: OSError, second: OSError) -> CacheError:
        import tempfile

        return CacheError(
            f"The compiled model fits neither in the cache {self.root} ({_reason(error)}) "
            f"nor in {tempfile.gettempdir()} ({_reason(second)})",
            "Free space on the disk, or set TRANSOM_CACHE to a folder with enough space",
        )

    def _temporary_cache(self, error: OSError) -> TemporaryCache:
        """The temporary cache of this process, created once `error` shows that the cache itself cannot be used."""
        if self._temporary is None:
            try:
                self._temporary = TemporaryCache()
            except OSError as second:
                raise self._no_room(error, second) from second
        self._warn(error)
        return self._temporary

    def _warn(self, error: OSError) -> None:
        if not self.warnings:
            self.warnings.append(self.keeps_nothing(error))
            _log.warning("%s", self.warnings[0])

    def _json_store(self, path: Path) -> JsonStore:
        return self._json_stores.setdefault(path, JsonStore(path))

    def _remembered(self, name: str) -> JsonStore:
        return self._json_store(self.root / "remembered" / f"{check_key(name)}.json")

    def _remember(self, store: JsonStore, key: str, value: object) -> None:
        store.remember(key, value)
        if store.unwritable is not None:
            self._warn(store.unwritable)

    def _make_root(self) -> None:
        if not self.root.is_dir():
            if os.path.lexists(self.root):
                raise NotADirectoryError(errno.ENOTDIR, "it is not a directory", str(self.root))
            make_private(self.root)
            (self.root / "CACHEDIR.TAG").write_bytes(_TAG)

    def _make_room(self) -> None:
        if self.limit is None:
            return
        from filelock import FileLock, Timeout

        from transom.artifacts import housekeeping

        try:
            with FileLock(self.root / "locks" / "evict.lock", timeout=0):
                housekeeping.evict(self.root, limit=self.limit)
        except Timeout:
            return  # another process is evicting
        except OSError as error:
            _log.debug("the cache %s cannot be pruned: %s", self.root, error)

    def _lock(self, key: str, progress: Progress | None) -> AbstractContextManager[object]:
        """The acquired lock of one key. Where no lock file can be created, nothing can be written either: no lock."""
        from filelock import FileLock, Timeout

        try:
            self._make_root()
            make_private(self.root / "locks")
            lock = FileLock(self.root / "locks" / f"{key}.lock")
        except OSError:
            return nullcontext()
        wait = 0.0
        while True:
            try:
                return lock.acquire(timeout=wait)
            except Timeout:
                wait = 0.25
                if progress is not None:
                    progress("wait", None)
            except OSError:
                return nullcontext()


class TemporaryCache:
    """A temporary folder used in place of the cache. Removed with the last reference, or when Python ends."""

    def __init__(self) -> None:
        import tempfile

        _sweep_temporary(Path(tempfile.gettempdir()))
        self.root = Path(tempfile.mkdtemp(prefix=_TEMPORARY_PREFIX))
        self._lock = lock_folder(self.root, create=True)
        self._remove = weakref.finalize(self, _remove_own, self.root, os.getpid())

    def entries(self, kind: str) -> EntryStore:
        return EntryStore(self.root, kind, owner=self)


def _remove_own(root: Path, maker: int) -> None:
    if os.getpid() == maker:  # a forked child runs this too and must not remove its parent's files
        delete(root)


def _sweep_temporary(parent: Path) -> None:
    """Remove the temporary folders of killed processes; a living process holds a lock on its own."""
    for folder in parent.glob(_TEMPORARY_PREFIX + "*"):
        if is_left_over(folder):
            delete(folder)


_OPENED: dict[tuple[Path, int | None], Cache] = {}
_FIX = "Free space there, or set TRANSOM_CACHE to a folder that can be written"


def _default_root() -> Path:
    if root := os.environ.get("TRANSOM_CACHE", "").strip():
        return Path(root)
    from platformdirs import user_cache_path

    return user_cache_path("transom", appauthor=False)


def _reason(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__
