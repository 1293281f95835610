"""Writes a bundle atomically. `transom.bundles.manifest` describes its content."""

from __future__ import annotations

import errno
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from transom.artifacts import FileRecord, hash_file
from transom.artifacts.entries import check_file_name
from transom.artifacts.files import delete, is_left_over, lock_folder, sync_file, sync_folder, unique, write_durably
from transom.bundles.bundle import files_in
from transom.bundles.manifest import SHARED, BundleError, BundleManifest, Variant, read_manifest
from transom.errors import OptionError, option
from transom.sources import bundle_at
from transom.sources.resolve import BUNDLE_MANIFEST

if TYPE_CHECKING:
    from transom.contract import Progress

_STAGING = ".transom"
_NO_LINK = frozenset(
    {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
)
"""Errors of linking a file after which the file is copied instead."""


def require_free(folder: Path, *, overwrite: bool) -> None:
    """Check that a bundle can be written to a folder without replacing anything else.

    Raises:
        OptionError: the folder is not empty, or holds a bundle and `overwrite` is False; its parent is missing or
            cannot be written; or the present content cannot be read.
    """
    other = "Choose another folder"
    try:
        around = folder.parent.is_dir()
    except OSError as error:
        raise OptionError(f"The folder {folder.parent} cannot be read: {error.strerror or error}", other) from error
    if not around:
        raise OptionError(
            f"There is no folder {folder.parent} to write the bundle into", "Create it, or choose another folder"
        )
    try:  # permissions do not show read-only or special file systems, or too long names
        os.rmdir(tempfile.mkdtemp(prefix=f".{folder.name}{_STAGING}-", dir=folder.parent))
    except OSError as error:
        raise OptionError(f"The folder {folder.parent} cannot be written: {error.strerror or error}", other) from error
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise OptionError(f"{folder} exists and is not a folder", other)
    try:
        empty = not any(folder.iterdir())
    except OSError as error:
        raise OptionError(f"The folder {folder} cannot be read: {error.strerror or error}", other) from error
    if empty:
        return
    if bundle_at(folder) is None:
        raise OptionError(f"The folder {folder} is not empty", f"{other}, or empty it")
    if not overwrite:
        raise OptionError(
            f"There is a bundle in {folder} already", f"{other}, or replace it with {option('overwrite', True)}"
        )
    if foreign := sorted(files_in(folder) - read_manifest(folder).files.keys()):
        raise OptionError(
            f"The bundle in {folder} cannot be overwritten: {foreign[0]} is not a part of it",
            "Remove that file first",
        )


@dataclass(frozen=True)
class VariantFiles:
    """A variant to write, with its files."""

    variant: Variant
    """The variant without `files`, which are set when they are written."""
    files: Mapping[str, bytes | Path]
    """The backend's name of a file -> its content or path."""
    take: Callable[[], bool] | None = None
    """Removes the folder that holds the files, and returns whether it did. The files are then moved by hard links.

    They are copied where this is None, where it fails, and where the file system has no links: ONNX rejects weights
    with more than one link.
    """


def write_bundle(
    folder: Path,
    manifest: BundleManifest,
    files: Mapping[str, bytes | Path],
    pieces: Sequence[VariantFiles],
    finish: Callable[[BundleManifest], Mapping[str, bytes]],
    *,
    overwrite: bool,
    progress: Progress,
) -> BundleManifest:
    """Write a bundle to a folder beside its destination, and rename that when everything is on the disk.

    Args:
        manifest: without variants and files.
        files: content or path by name, for the bundle's root.
        finish: returns further files for the root, from the manifest with its variants.

    Raises:
        OptionError: as `require_free`.
        BundleError: the disk is full, or cannot be written.
    """
    try:
        with _staging(folder) as staging:
            new = _Staged(staging / "new")
            total, done = len(files) + sum(len(piece.files) for piece in pieces), 0
            for name, content in files.items():
                progress("write", done / total)
                new.put(name, content)
                done += 1
            variants: list[Variant] = []
            for piece in pieces:
                placed = {}
                for name, content in piece.files.items():
                    progress("write", done / total)
                    placed[name] = new.put_of(piece, name, content)
                    done += 1
                same = next((v.files for v in variants if new.equal(v.files, placed)), None)
                if same is not None:
                    new.drop(set(placed.values()) - set(same.values()))
                variants.append(replace(piece.variant, files=same or placed))
            manifest = replace(manifest, variants=tuple(variants))
            for name, content in finish(manifest).items():
                new.put(name, content)
            manifest = replace(manifest, files=dict(new.records))
            text = json.dumps(manifest.to_json(), indent=1, allow_nan=False)
            write_durably(new.folder / BUNDLE_MANIFEST, text.encode() + b"\n")
            new.sync()
            progress("write", 1.0)
            require_free(folder, overwrite=overwrite)  # the folder may have changed since the first check
            for take, linked in new.linked:
                if linked and not take():
                    for target in linked:
                        _separate(target, staging / "copy")
            _publish(new.folder, folder, staging / _REPLACED)
            return manifest
    except OSError as error:
        raise BundleError(
            f"The bundle {folder} cannot be written: {error.strerror or error}",
            "Free space there, or choose another folder",
        ) from error


class _Staged:
    """The folder of a bundle while it is written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records: dict[str, FileRecord] = {}
        self.linked: list[tuple[Callable[[], bool], list[Path]]] = []
        """Files that still have their old name, with the function that removes it."""
        folder.mkdir()

    def put(self, name: str, content: bytes | Path, take: Callable[[], bool] | None = None) -> None:
        target = self.folder / check_file_name(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        if take is not None and _link(content, target):
            if not self.linked or self.linked[-1][0] is not take:
                self.linked.append((take, []))
            self.linked[-1][1].append(target)
        else:
            _copy(content, target)
        self.records[name] = FileRecord(target.stat().st_size, hash_file(target))

    def put_of(self, piece: VariantFiles, name: str, content: bytes | Path) -> str:
        """Write a file of a variant and return its path. A file that variants share is written once."""
        own = f"{piece.variant.name}/{name}"
        if not name.startswith(f"{SHARED}/"):
            self.put(own, content, piece.take)
            return own
        if name not in self.records:
            self.put(name, content, piece.take)
            return name
        self.put(own, content, piece.take)
        if self.records[own] != self.records[name]:
            return own
        self.drop({own})
        return name

    def equal(self, one: Mapping[str, str], other: Mapping[str, str]) -> bool:
        """Whether two variants have files of the same names and contents."""
        return one.keys() == other.keys() and all(
            self.records[one[n]] == self.records[other[n]] or one[n] == other[n] for n in one
        )

    def drop(self, names: Iterable[str]) -> None:
        for name in names:
            target = self.folder / name
            target.unlink()
            del self.records[name]
            for _, linked in self.linked:
                if target in linked:
                    linked.remove(target)
            for parent in target.relative_to(self.folder).parents:
                if parent.name and not any((self.folder / parent).iterdir()):
                    (self.folder / parent).rmdir()

    def sync(self) -> None:
        for parent in {self.folder, *((self.folder / name).parent for name in self.records)}:
            sync_folder(parent)


_REPLACED = "replaced"


def _link(content: bytes | Path, target: Path) -> bool:
    """Hard-link a file. False if that is not possible, or if the file already has several links."""
    if not isinstance(content, Path) or content.stat().st_nlink > 1:
        return False
    try:
        os.link(content, target)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        return False
    return True


def _copy(content: bytes | Path, target: Path) -> None:
    if not isinstance(content, Path):
        write_durably(target, content)
        return
    import shutil

    shutil.copyfile(content, target)
    sync_file(target)


def _separate(target: Path, copy: Path) -> None:
    """Replace a hard link by a copy of the file."""
    _copy(target, copy)
    os.replace(copy, target)
    sync_folder(target.parent)


def _publish(new: Path, folder: Path, aside: Path) -> None:
    """Rename a finished bundle to its destination, after moving an older one aside."""
    old = folder.is_dir() and any(folder.iterdir())
    if old:
        os.rename(folder, aside)
    elif folder.is_dir():
        folder.rmdir()
    try:
        os.rename(new, folder)
    except OSError:
        if old:
            os.rename(aside, folder)
        raise
    sync_folder(folder.parent)


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A temporary hidden folder beside the destination. Removes those that killed processes left."""
    for left in folder.parent.glob(f".*{_STAGING}-*"):
        _sweep(left)
    staging = folder.with_name("." + unique(folder.name + _STAGING))
    staging.mkdir()
    held = None
    try:
        held = lock_folder(staging, create=True)
        yield staging
    finally:
        if held is not None:
            held.release()
        delete(staging)


def _sweep(left: Path) -> None:
    """Remove the temporary folder of a killed process, unless it may hold the only copy of a bundle."""
    place = left.with_name(left.name[1:].rpartition(_STAGING)[0])
    if is_left_over(left) and (place.exists() or not (left / _REPLACED).exists()):
        delete(left)


def now() -> str:
    """The time in the format of manifests: UTC, in seconds."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
