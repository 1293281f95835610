"""Writing a bundle in one step: whole, or not at all. What is in one, `transom.bundles.manifest` says."""

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
from transom.artifacts.files import delete, hold, is_left_over, sync_file, sync_folder, unique, write_durably
from transom.bundles.bundle import files_in
from transom.bundles.manifest import SHARED, BundleError, BundleManifest, Variant, read_manifest
from transom.errors import OptionError
from transom.sources import bundle_at
from transom.sources.resolve import BUNDLE_MANIFEST

if TYPE_CHECKING:
    from transom.contract import Progress

_STAGING = ".transom"
_NO_LINK = frozenset(
    {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
)
"""What linking a file fails with where files have to be copied."""


def require_free(folder: Path, *, overwrite: bool) -> None:
    """Refuse to write a bundle where it cannot be, or where it would take the place of something else.

    Raises:
        OptionError: the folder is not empty, or there is a bundle and it is not to be overwritten, or the folder around
            it is missing or cannot be written, or what is there cannot be read.
    """
    other = "Choose another folder"
    try:
        around = folder.parent.is_dir()
    except OSError as error:
        raise OptionError(f"The folder {folder.parent} cannot be read: {error.strerror or error}", other) from error
    if not around:
        raise OptionError(
            f"There is no folder {folder.parent} to write the bundle into", "Make it, or choose another folder"
        )
    try:  # permissions do not tell: of file systems that are read-only or kept by the kernel, and of names too long
        os.rmdir(tempfile.mkdtemp(prefix=f".{folder.name}{_STAGING}-", dir=folder.parent))
    except OSError as error:
        raise OptionError(f"The folder {folder.parent} cannot be written: {error.strerror or error}", other) from error
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise OptionError(f"{folder} is there already and is no folder", other)
    try:
        empty = not any(folder.iterdir())
    except OSError as error:
        raise OptionError(f"The folder {folder} cannot be read: {error.strerror or error}", other) from error
    if empty:
        return
    if bundle_at(folder) is None:
        raise OptionError(f"The folder {folder} is not empty", f"{other}, or empty it")
    if not overwrite:
        raise OptionError(f"There is a bundle in {folder} already", f"{other}, or replace it with overwrite=True")
    if foreign := sorted(files_in(folder) - read_manifest(folder).files.keys()):
        raise OptionError(
            f"The bundle in {folder} cannot be overwritten: {foreign[0]} is not a part of it",
            "Take that file away first",
        )


@dataclass(frozen=True)
class VariantFiles:
    """One variant that is to be written."""

    variant: Variant
    """Without `files`, which are found here."""
    files: Mapping[str, bytes | Path]
    """Content or path by the name that the backend knows."""
    take: Callable[[], bool] | None = None
    """Removes the folder that the files are in, and says whether it went. With it they move, where the file system
    allows that; None, and where it stays: they are copied, since ONNX refuses weights that have two names."""


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
    """Write a bundle, whole or not at all: beside its place first, and renamed when all of it is on the disk.

    Args:
        manifest: without variants and files.
        files: content or path by name, for the bundle's root.
        finish: what is to be in the root besides, made of the manifest when its variants are known.

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
            require_free(folder, overwrite=overwrite)  # it has been long since somebody looked
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
    """A bundle's folder while it is made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records: dict[str, FileRecord] = {}
        self.linked: list[tuple[Callable[[], bool], list[Path]]] = []
        """Files that still have their old name, by what takes that away."""
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
        """One file of a variant; where it lies. One that several variants may read is there once."""
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
    """Give a file a second name. False where that cannot be, or where somebody else has done so already."""
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
    """Make one of a file's names a file of its own."""
    _copy(target, copy)
    os.replace(copy, target)
    sync_folder(target.parent)


def _publish(new: Path, folder: Path, aside: Path) -> None:
    """Rename a finished bundle to its place, an older one first out of it."""
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
    """A hidden folder beside the bundle's place, gone at the end; what killed processes left there goes first."""
    for left in folder.parent.glob(f".*{_STAGING}-*"):
        _sweep(left)
    staging = folder.with_name("." + unique(folder.name + _STAGING))
    staging.mkdir()
    held = None
    try:
        held = hold(staging, create=True)
        yield staging
    finally:
        if held is not None:
            held.release()
        delete(staging)


def _sweep(left: Path) -> None:
    """Remove the folder of a process that was killed; not where it may hold the only copy of a bundle."""
    place = left.with_name(left.name[1:].rpartition(_STAGING)[0])
    if is_left_over(left) and (place.exists() or not (left / _REPLACED).exists()):
        delete(left)


def now() -> str:
    """The time as manifests have it: UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
