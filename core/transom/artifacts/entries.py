"""Entries of the cache: folders that appear complete or not at all, and are checked each time they are opened.

An `EntryStore` is a folder of entries of one kind. An `EntryWriter` builds an entry under `building/`, writes the
manifest last and renames the folder into place. Opening an entry checks its manifest, the sizes of its files, and
samples of their contents; the whole contents are hashed the first time, and whenever a file was written or replaced
since. A corrupt entry counts as absent.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypedDict

from transom.artifacts.files import (
    MARK,
    FolderLock,
    hash_file,
    lock_folder,
    make_private,
    move_aside,
    remove_unless_locked,
    replace_atomically,
    sync_file,
    sync_folder,
    unique,
    write_durably,
)
from transom.artifacts.keys import FORMAT, check_key, json_hash
from transom.artifacts.samples import same_samples, take_samples
from transom.typed import WrongType, from_json, typed

if TYPE_CHECKING:
    from transom.contract import Progress

Verify = Literal["auto", "full", "sizes"]
"""How to check an entry: hashes on first use and after a change, and samples; hashes always; or sizes only."""

MANIFEST = "manifest.json"
VERIFIED = "verified.json"
VERDICTS = "verdicts.json"
FILES = "files"
WORK = "work"
SCRATCH = "scratch"

_OCCUPIED = frozenset({errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EACCES})
"""Error numbers of renaming a folder to a name that exists; EACCES on Windows."""

_log = logging.getLogger("transom.artifacts")


class CorruptEntry(Exception):
    """The entry must not be used; the text is the reason. Never leaves this package."""


@dataclass(frozen=True)
class FileRecord:
    bytes: int
    blake2b: str
    """The result of `hash_file`."""


class Ingredients(TypedDict, total=False):
    """What an artifact was compiled with and what the backend claims for it; not part of its key."""

    exact: bool
    divergence: float | None
    decomposed: list[str]
    sparsity: str


class ArtifactFacts(TypedDict):
    """The facts in the manifest of an artifact: of its `Origin`, and of `contract.Artifact`."""

    source: str
    backend: str
    backend_version: str
    device: dict[str, str]
    drivers: dict[str, str]
    options: dict[str, object]
    ingredients: Ingredients
    requires: dict[str, str]
    notes: list[str]


class _Manifest(TypedDict):
    """A manifest file."""

    format: int
    key: str
    created: float
    facts: dict[str, object]
    files: dict[str, FileRecord]
    blake2b: str
    """`json_hash` of the other values."""


class _Verified(TypedDict):
    """What `verified.json` says."""

    files: dict[str, list[int]]
    """Size, inode and times of each file when it was hashed."""
    samples: dict[str, list[tuple[int, str]]]


@dataclass(frozen=True)
class EntryManifest:
    """The contents of an entry's manifest file."""

    key: str
    created: float
    """Seconds since 1970."""
    files: Mapping[str, FileRecord]
    facts: Mapping[str, object] = field(default_factory=dict)
    """Information from the code that wrote the entry, in JSON types."""
    format: int = FORMAT

    @property
    def bytes(self) -> int:
        return sum(record.bytes for record in self.files.values())

    def to_json(self) -> str:
        """Raises TypeError or ValueError when the facts are not JSON."""
        files = {name: {"bytes": f.bytes, "blake2b": f.blake2b} for name, f in self.files.items()}
        whole = {"format": self.format, "key": self.key, "created": self.created, "facts": self.facts, "files": files}
        return json.dumps(whole | {"blake2b": json_hash(whole)}, indent=1, allow_nan=False)

    @classmethod
    def read(cls, folder: Path, facts: type[Any] = dict[str, object]) -> EntryManifest:
        """The manifest of the entry in `folder`.

        Args:
            facts: the type of its facts (`transom.typed`).

        Raises:
            CorruptEntry: it is missing, damaged or of another format, or its facts are of another type.
        """
        try:
            raw = from_json(dict[str, object], (folder / MANIFEST).read_bytes())
            if (found := raw.get("format")) != FORMAT:
                raise CorruptEntry(f"it has format {str(found)[:40]}, this version reads {FORMAT}")
            whole = typed(_Manifest, raw)
            files = {check_file_name(name): record for name, record in whole["files"].items()}
            typed(facts, whole["facts"], "facts")
            # Types do not show every damage: a model may have a decoder or none.
            if json_hash({name: value for name, value in raw.items() if name != "blake2b"}) != whole["blake2b"]:
                raise CorruptEntry("its manifest is damaged: its content does not match its hash")
            return cls(key=whole["key"], created=whole["created"], files=files, facts=whole["facts"])
        except FileNotFoundError as error:
            raise CorruptEntry("it has no manifest") from error
        except OSError as error:
            raise CorruptEntry(f"its manifest cannot be read ({error.strerror or error})") from error
        except WrongType as error:
            raise CorruptEntry(f"its manifest is damaged: {error}") from error
        except ValueError as error:
            raise CorruptEntry("its manifest is damaged") from error


def check_file_name(name: str) -> str:
    """The name itself when it stays inside an entry on every system. Raises ValueError."""
    path = PurePosixPath(name)
    inside = name == str(path) and not path.is_absolute() and path.parts and ".." not in path.parts
    if not inside or any(c in name for c in '\\:\0*?"<>|'):
        raise ValueError(f"not a usable file name: {name!r}; use a relative path with '/'")
    return name


class Entry:
    """An open entry. Its lock prevents eviction until `release`, the end of a `with`, or its garbage collection."""

    def __init__(self, store: EntryStore, path: Path, manifest: EntryManifest, lock: FolderLock) -> None:
        self.path = path
        self.manifest = manifest
        self._store = store  # also keeps a temporary cache alive
        self._lock = lock

    @property
    def key(self) -> str:
        return self.manifest.key

    @property
    def files(self) -> dict[str, Path]:
        """Every file by name. They are shared with other processes and must not be changed."""
        return {name: self.path / FILES / name for name in self.manifest.files}

    def read(self, name: str) -> bytes:
        """A file's content. Raises KeyError when the entry has no such file."""
        return self.files[name].read_bytes()

    def touch(self) -> None:
        """Set the time of last use to now. Does nothing in a read-only cache."""
        try:
            os.utime(self.path / MARK)
        except OSError as error:
            _log.debug("cannot note the use of %s: %s", self.path, error)

    def discard(self, reason: str) -> None:
        """Remove the entry, as after a "rebuild" verdict."""
        self._store.discard(self.path, self._lock, reason)

    def remove(self) -> bool:
        """Release the entry, and remove it unless it is locked elsewhere. False when it has to stay."""
        self.release()
        return self._store.remove(self.path.name)

    def release(self) -> None:
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


class EntryStore:
    """The entries of one kind below `root`. Reading never raises for the state of the disk; writing raises OSError."""

    def __init__(self, root: Path, kind: str, owner: object = None) -> None:
        self.root = root
        self.kind = kind
        self.folder = root / kind
        self.trash = root / "trash"
        self._owner = owner  # keeps the temporary cache alive, whose end removes the folder
        self._verified: dict[str, _Verified] = {}
        """What `verified.json` of an entry says, or would say in a cache that cannot be written."""

    def lookup(
        self,
        key: str,
        *,
        facts: type[Any] = dict[str, object],
        verify: Verify = "auto",
        progress: Progress | None = None,
    ) -> Entry | None:
        """The open entry, or None when there is no sound one. A corrupt one is removed and logged.

        Args:
            facts: the type of the manifest's facts; an entry with others is corrupt.
        """
        path = self.folder / check_key(key)
        try:
            lock = self._lock(path)
        except OSError as error:
            _log.warning("cache entry %s/%s cannot be opened (%s); it is ignored", self.kind, key, error.strerror)
            return None
        try:
            if lock is None:
                if not os.path.isdir(path):
                    return None
                raise CorruptEntry("it is incomplete")
            entry = self._open(path, lock, facts, verify, progress)
        except CorruptEntry as error:
            if lock is None or lock.is_at(path):  # else another process has already made it again
                self.discard(path, lock, str(error))
            if lock is not None:
                lock.release()
            return None
        except BaseException:
            if lock is not None:
                lock.release()
            raise
        entry.touch()
        return entry

    def _lock(self, path: Path) -> FolderLock | None:
        lock = lock_folder(path)
        for _ in range(3):
            if lock is not None or not os.path.isdir(path):
                break
            lock = lock_folder(path)  # no mark a moment ago, but the folder may have been replaced since
        return lock

    def _open(self, path: Path, lock: FolderLock, facts: type[Any], verify: Verify, progress: Progress | None) -> Entry:
        manifest = EntryManifest.read(path, facts)
        if manifest.key != path.name:
            raise CorruptEntry(f"it belongs to the key {manifest.key}")
        identities: dict[str, list[int]] = {}
        for name, record in manifest.files.items():
            try:
                found = os.lstat(path / FILES / name)
            except OSError as error:
                raise CorruptEntry(f"its file {name} is missing") from error
            if not stat.S_ISREG(found.st_mode):
                raise CorruptEntry(f"its file {name} is not a plain file")
            if found.st_size != record.bytes:
                raise CorruptEntry(f"its file {name} has {found.st_size} bytes instead of {record.bytes}")
            # The change time cannot be set by a program, unlike the modification time; the inode tells a replaced file.
            identities[name] = [found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]
        if verify == "full" or (verify == "auto" and not self._is_verified(path, identities)):
            self._compare_hashes(path, manifest, progress)
            self._note_verified(path, identities)
        return Entry(self, path, manifest, lock)

    def _is_verified(self, path: Path, identities: Mapping[str, list[int]]) -> bool:
        """Whether the files are those that were hashed last, and still have the samples of then."""
        try:
            noted = self._verified.get(path.name) or from_json(_Verified, (path / VERIFIED).read_bytes())
            samples = noted["samples"]
            if noted["files"] != identities or samples.keys() != identities.keys():
                return False
            return all(same_samples(path / FILES / name, samples[name]) for name in identities)
        except (OSError, WrongType):
            return False

    def _note_verified(self, path: Path, identities: Mapping[str, list[int]]) -> None:
        try:
            samples = {name: take_samples(path / FILES / name) for name in identities}
            noted: _Verified = {"files": dict(identities), "samples": samples}
            self._verified[path.name] = noted
            replace_atomically(path / VERIFIED, json.dumps(noted).encode())
        except OSError as error:
            _log.debug("cannot note that %s is intact: %s", path, error)

    def _compare_hashes(self, path: Path, manifest: EntryManifest, progress: Progress | None) -> None:
        for name, record in manifest.files.items():
            try:
                found = hash_file(path / FILES / name, progress)
            except OSError as error:
                raise CorruptEntry(f"its file {name} cannot be read ({error.strerror or error})") from error
            if found != record.blake2b:
                raise CorruptEntry(f"the content of its file {name} has changed")

    def discard(self, path: Path, lock: FolderLock | None, reason: str) -> None:
        """Remove an entry even if it is in use (open files stay readable), and log the reason in one line."""
        if sys.platform == "win32" and lock is not None:
            lock.release()
        self._verified.pop(path.name, None)
        gone = move_aside(path, self.trash)
        if self.kind == "artifacts":  # what an SDK stored for a bad artifact is not trusted either
            move_aside(self.root / SCRATCH / path.name, self.trash)
        outcome = "it was removed" if gone or not path.exists() else "it cannot be removed"
        _log.warning("cache entry %s/%s is not used: %s; %s", self.kind, path.name, reason, outcome)

    def remove(self, key: str) -> bool:
        """Remove an entry that is not locked, and its scratch folder. False when it has to stay."""
        if not remove_unless_locked(self.folder / key, self.trash):
            return False
        self._verified.pop(key, None)
        if self.kind == "artifacts":
            remove_unless_locked(self.root / SCRATCH / key, self.trash)
        return True

    def begin(self, key: str) -> EntryWriter:
        """Start an entry. Raises OSError when nothing can be written here."""
        building = self.root / "building"
        make_private(building)
        make_private(self.folder)
        while True:
            path = building / unique(check_key(key))
            path.mkdir(mode=0o700)
            lock = lock_folder(path, create=True)
            if lock is not None:
                return EntryWriter(self, key, path, lock)

    def folders(self) -> Iterator[Path]:
        """The folders of all entries, corrupt ones included."""
        try:
            names = sorted(os.listdir(self.folder))
        except (FileNotFoundError, NotADirectoryError):
            return
        yield from (self.folder / name for name in names)


class EntryWriter:
    """Writes one entry, which is invisible until `commit`. What a killed process leaves behind is swept later."""

    def __init__(self, store: EntryStore, key: str, path: Path, lock: FolderLock) -> None:
        self.store = store
        self.key = key
        self.path = path
        self._lock = lock
        self._moved: dict[Path, Path] = {}

    @property
    def work(self) -> Path:
        """A folder on the cache's file system; files in it are moved into the entry, not copied."""
        work = self.path / WORK
        work.mkdir(exist_ok=True)
        return work

    def where(self, source: Path) -> Path:
        """The current path of a file, which a failed `commit` may have moved."""
        return self._moved.get(source.absolute(), source)

    def commit(
        self, files: Mapping[str, bytes | Path], facts: Mapping[str, object], progress: Progress | None = None
    ) -> Entry:
        """Write everything, make it durable, and publish the entry under its key, replacing an older one.

        Raises OSError when a file cannot be read or written, ValueError for a bad file name, TypeError or ValueError
        for facts that are not JSON. After an error the writer can only be abandoned.
        """
        if len({check_file_name(name).lower() for name in files}) != len(files):
            raise ValueError("two files differ by upper and lower case alone")
        EntryManifest(self.key, 0.0, {}, facts).to_json()
        records = {}
        for done, (name, content) in enumerate(files.items()):
            if progress is not None:
                progress("store", done / len(files))
            target = self.path / FILES / name
            self._place(content, target)
            records[name] = FileRecord(target.stat().st_size, hash_file(target))
        if (self.path / WORK).exists():
            import shutil

            shutil.rmtree(self.path / WORK)
        (self.path / FILES).mkdir(exist_ok=True)
        manifest = EntryManifest(self.key, time.time(), records, dict(facts))
        write_durably(self.path / MANIFEST, manifest.to_json().encode())
        for folder in {self.path, *((self.path / FILES / name).parent for name in files)}:
            sync_folder(folder)
        return self._publish(manifest)

    def _place(self, content: bytes | Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, Path):
            write_durably(target, bytes(content))
            return
        source = content.absolute()
        if source.is_relative_to(self.path / WORK) and not source.is_symlink() and source.exists():
            os.rename(source, target)
            self._moved[source] = target
        else:
            import shutil

            shutil.copyfile(self.where(source), target)
        sync_file(target)

    def _publish(self, manifest: EntryManifest) -> Entry:
        path = self.store.folder / self.key
        os.utime(self.path / MARK)
        if sys.platform == "win32":  # a folder with an open file in it cannot be renamed there
            self._lock.release()
        for attempt in range(10):
            try:
                os.rename(self.path, path)
                break
            except OSError as error:
                if error.errno not in _OCCUPIED or attempt == 9:
                    raise
                if (same := self._equal_entry(path, manifest)) is not None:
                    self.abandon()
                    return same
                if not move_aside(path, self.store.trash) and os.path.lexists(path):
                    raise
        sync_folder(self.store.folder)
        lock = lock_folder(path) if sys.platform == "win32" else self._lock
        if lock is None:
            raise FileNotFoundError(f"{path} was removed just after it was written")
        return Entry(self.store, path, manifest, lock)

    def _equal_entry(self, path: Path, manifest: EntryManifest) -> Entry | None:
        """The entry that another process has published meanwhile, if it equals this one: it may be open there."""
        lock = lock_folder(path)
        if lock is None:
            return None
        try:
            other = EntryManifest.read(path)
        except CorruptEntry:
            other = None
        if other is not None and (other.files, other.facts) == (manifest.files, manifest.facts):
            return Entry(self.store, path, other, lock)
        lock.release()
        return None

    def abandon(self) -> None:
        """Remove what has been written so far. Does nothing after a successful `commit`."""
        if self._lock.is_at(self.path):
            self._lock.release()
            remove_unless_locked(self.path, self.store.trash)
