"""Entries of the cache: folders that appear complete or not at all, and are checked each time they are opened.

A `Shelf` is a folder of entries of one kind. An entry is made as a `Draft` under `building/` and renamed into place;
its manifest is written last. Opening an entry compares its manifest and the sizes of its files; the contents are
hashed the first time and whenever a file's size or time has changed since. Doubt means absent.
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
from typing import TYPE_CHECKING, Literal, Self

from transom.artifacts.files import (
    MARK,
    Hold,
    hash_file,
    hold,
    move_aside,
    remove_unless_held,
    replace_atomically,
    sync_file,
    sync_folder,
    unique,
    write_durably,
)
from transom.artifacts.keys import FORMAT, check_key

if TYPE_CHECKING:
    from transom.contract import Progress

Verify = Literal["auto", "full", "sizes"]
"""How far to check an entry: hashes on first use and after a change, hashes always, or sizes alone."""

MANIFEST = "manifest.json"
VERIFIED = "verified.json"
VERDICTS = "verdicts.json"
FILES = "files"
WORK = "work"
SCRATCH = "scratch"

_OCCUPIED = frozenset({errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EACCES})
"""What renaming a folder to a name that is taken fails with; EACCES on Windows."""

_log = logging.getLogger("transom.artifacts")


class Doubt(Exception):
    """The entry cannot be trusted; the text says why. Never leaves this package."""


@dataclass(frozen=True)
class FileRecord:
    bytes: int
    blake2b: str
    """As `hash_file` computes it."""


@dataclass(frozen=True)
class Manifest:
    """What an entry says about itself."""

    key: str
    created: float
    """Seconds since 1970."""
    files: Mapping[str, FileRecord]
    facts: Mapping[str, object] = field(default_factory=dict)
    """What the maker of the entry wants to be known, in JSON types."""
    format: int = FORMAT

    @property
    def bytes(self) -> int:
        return sum(record.bytes for record in self.files.values())

    def to_json(self) -> str:
        """Raises TypeError or ValueError when the facts are not JSON."""
        files = {name: {"bytes": f.bytes, "blake2b": f.blake2b} for name, f in self.files.items()}
        whole = {"format": self.format, "key": self.key, "created": self.created, "facts": self.facts, "files": files}
        return json.dumps(whole, indent=1, allow_nan=False)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of the entry in `folder`. Raises Doubt."""
        try:
            whole = json.loads((folder / MANIFEST).read_bytes())
            if whole["format"] != FORMAT:
                raise Doubt(f"it has format {whole['format']}, this version reads {FORMAT}")
            files = {
                check_file_name(name): FileRecord(int(f["bytes"]), str(f["blake2b"]))
                for name, f in whole["files"].items()
            }
            facts = whole["facts"]
            if not isinstance(facts, dict):
                raise TypeError("facts")
            return cls(key=str(whole["key"]), created=float(whole["created"]), files=files, facts=facts)
        except FileNotFoundError as error:
            raise Doubt("it has no manifest") from error
        except OSError as error:
            raise Doubt(f"its manifest cannot be read ({error.strerror or error})") from error
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise Doubt("its manifest is damaged") from error


def check_file_name(name: str) -> str:
    """The name itself when it stays inside an entry on every system. Raises ValueError."""
    path = PurePosixPath(name)
    inside = name == str(path) and not path.is_absolute() and path.parts and ".." not in path.parts
    if not inside or any(c in name for c in '\\:\0*?"<>|'):
        raise ValueError(f"not a usable file name: {name!r}; use a relative path with '/'")
    return name


class Entry:
    """An open entry: it is held, and so not evicted, until `release`, the end of a `with`, or the object's end."""

    def __init__(self, shelf: Shelf, path: Path, manifest: Manifest, held: Hold) -> None:
        self.path = path
        self.manifest = manifest
        self._shelf = shelf  # also keeps a temporary shelf alive
        self._hold = held

    @property
    def key(self) -> str:
        return self.manifest.key

    @property
    def files(self) -> dict[str, Path]:
        """Every file by name; they are shared with other processes and must not be changed."""
        return {name: self.path / FILES / name for name in self.manifest.files}

    def read(self, name: str) -> bytes:
        """A file's content. Raises KeyError when the entry has no such file."""
        return self.files[name].read_bytes()

    def touch(self) -> None:
        """Count as used now; in a read-only cache nothing happens."""
        try:
            os.utime(self.path / MARK)
        except OSError as error:
            _log.debug("cannot note the use of %s: %s", self.path, error)

    def discard(self, reason: str) -> None:
        """Remove the entry, as after a "rebuild" verdict; it is made again when it is next wanted."""
        self._shelf.discard(self.path, self._hold, reason)

    def remove(self) -> bool:
        """Release the entry, and remove it unless somebody else holds it. False when it has to stay."""
        self.release()
        return self._shelf.remove(self.path.name)

    def release(self) -> None:
        self._hold.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


class Shelf:
    """The entries of one kind below `root`. Reading never raises for the state of the disk; writing raises OSError."""

    def __init__(self, root: Path, kind: str, owner: object = None) -> None:
        self.root = root
        self.kind = kind
        self.folder = root / kind
        self.trash = root / "trash"
        self._owner = owner  # what removes a temporary root when nobody refers to it any more
        self._verified: dict[str, object] = {}

    def lookup(self, key: str, *, verify: Verify = "auto", progress: Progress | None = None) -> Entry | None:
        """The entry, held, or None when there is none that can be trusted; then it has been removed and logged."""
        path = self.folder / check_key(key)
        try:
            held = self._hold(path)
        except OSError as error:
            _log.warning("cache entry %s/%s cannot be opened (%s); doing without", self.kind, key, error.strerror)
            return None
        try:
            if held is None:
                if not os.path.isdir(path):
                    return None
                raise Doubt("it is incomplete")
            entry = self._open(path, held, verify, progress)
        except Doubt as doubt:
            if held is None or held.keeps(path):  # else another process has already made it again
                self.discard(path, held, str(doubt))
            if held is not None:
                held.release()
            return None
        except BaseException:
            if held is not None:
                held.release()
            raise
        entry.touch()
        return entry

    def _hold(self, path: Path) -> Hold | None:
        held = hold(path)
        for _ in range(3):
            if held is not None or not os.path.isdir(path):
                break
            held = hold(path)  # no mark a moment ago, but the folder may have been replaced since
        return held

    def _open(self, path: Path, held: Hold, verify: Verify, progress: Progress | None) -> Entry:
        manifest = Manifest.read(path)
        if manifest.key != path.name:
            raise Doubt(f"it belongs to the key {manifest.key}")
        signature: dict[str, list[int]] = {}
        for name, record in manifest.files.items():
            try:
                found = os.lstat(path / FILES / name)
            except OSError as error:
                raise Doubt(f"its file {name} is missing") from error
            if not stat.S_ISREG(found.st_mode):
                raise Doubt(f"its file {name} is not a plain file")
            if found.st_size != record.bytes:
                raise Doubt(f"its file {name} has {found.st_size} bytes instead of {record.bytes}")
            signature[name] = [found.st_size, int(found.st_mtime)]
        if verify == "full" or (verify == "auto" and signature != self._last_verified(path)):
            self._compare_hashes(path, manifest, progress)
            self._verified[path.name] = signature
            try:
                replace_atomically(path / VERIFIED, json.dumps(signature).encode())
            except OSError as error:
                _log.debug("cannot note that %s is intact: %s", path, error)
        return Entry(self, path, manifest, held)

    def _last_verified(self, path: Path) -> object:
        if path.name in self._verified:
            return self._verified[path.name]
        try:
            return json.loads((path / VERIFIED).read_bytes())
        except (OSError, ValueError, RecursionError):
            return None

    def _compare_hashes(self, path: Path, manifest: Manifest, progress: Progress | None) -> None:
        for name, record in manifest.files.items():
            try:
                found = hash_file(path / FILES / name, progress)
            except OSError as error:
                raise Doubt(f"its file {name} cannot be read ({error.strerror or error})") from error
            if found != record.blake2b:
                raise Doubt(f"the content of its file {name} has changed")

    def discard(self, path: Path, held: Hold | None, reason: str) -> None:
        """Remove an entry whoever uses it (open files stay readable), with one log line that says why."""
        if sys.platform == "win32" and held is not None:
            held.release()
        self._verified.pop(path.name, None)
        gone = move_aside(path, self.trash)
        if self.kind == "artifacts":  # what an SDK kept beside a bad artifact is no better
            move_aside(self.root / SCRATCH / path.name, self.trash)
        outcome = "it was removed" if gone or not path.exists() else "it cannot be removed"
        _log.warning("cache entry %s/%s is not used: %s; %s", self.kind, path.name, reason, outcome)

    def remove(self, key: str) -> bool:
        """Remove an entry that nobody holds, with its scratch folder. False when it has to stay."""
        if not remove_unless_held(self.folder / key, self.trash):
            return False
        self._verified.pop(key, None)
        if self.kind == "artifacts":
            remove_unless_held(self.root / SCRATCH / key, self.trash)
        return True

    def begin(self, key: str) -> Draft:
        """Start an entry. Raises OSError when nothing can be written here."""
        building = self.root / "building"
        building.mkdir(parents=True, exist_ok=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        while True:
            path = building / unique(check_key(key))
            path.mkdir()
            held = hold(path, create=True)
            if held is not None:
                return Draft(self, key, path, held)

    def folders(self) -> Iterator[Path]:
        """The folders of all entries, whatever their state."""
        try:
            names = sorted(os.listdir(self.folder))
        except (FileNotFoundError, NotADirectoryError):
            return
        yield from (self.folder / name for name in names)


class Draft:
    """An entry in the making, invisible until `commit`. What its process leaves behind when killed is swept later."""

    def __init__(self, shelf: Shelf, key: str, path: Path, held: Hold) -> None:
        self.shelf = shelf
        self.key = key
        self.path = path
        self._hold = held
        self._moved: dict[Path, Path] = {}

    @property
    def work(self) -> Path:
        """A folder on the cache's file system; files in it are moved into the entry, not copied."""
        work = self.path / WORK
        work.mkdir(exist_ok=True)
        return work

    def where(self, source: Path) -> Path:
        """Where a file is now that may have been moved by a `commit` that failed."""
        return self._moved.get(source.absolute(), source)

    def commit(
        self, files: Mapping[str, bytes | Path], facts: Mapping[str, object], progress: Progress | None = None
    ) -> Entry:
        """Write everything, make it durable, and let the entry appear under its key, replacing an older one.

        Raises OSError when a file cannot be read or written, ValueError for a bad file name, TypeError or ValueError
        for facts that are not JSON. After an error the draft can only be abandoned.
        """
        if len({check_file_name(name).lower() for name in files}) != len(files):
            raise ValueError("two files differ by upper and lower case alone")
        Manifest(self.key, 0.0, {}, facts).to_json()
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
        manifest = Manifest(self.key, time.time(), records, dict(facts))
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

    def _publish(self, manifest: Manifest) -> Entry:
        path = self.shelf.folder / self.key
        os.utime(self.path / MARK)
        if sys.platform == "win32":  # a folder with an open file in it cannot be renamed there
            self._hold.release()
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
                if not move_aside(path, self.shelf.trash) and os.path.lexists(path):
                    raise
        sync_folder(self.shelf.folder)
        held = hold(path) if sys.platform == "win32" else self._hold
        if held is None:
            raise FileNotFoundError(f"{path} was removed just after it was written")
        return Entry(self.shelf, path, manifest, held)

    def _equal_entry(self, path: Path, manifest: Manifest) -> Entry | None:
        """The entry that another process made meanwhile, if it is just like this one: it may be open there."""
        held = hold(path)
        if held is None:
            return None
        try:
            other = Manifest.read(path)
        except Doubt:
            other = None
        if other is not None and (other.files, other.facts) == (manifest.files, manifest.facts):
            return Entry(self.shelf, path, other, held)
        held.release()
        return None

    def abandon(self) -> None:
        """Remove what has been written so far. After a `commit` that succeeded nothing happens."""
        if self._hold.keeps(self.path):
            self._hold.release()
            remove_unless_held(self.path, self.shelf.trash)
