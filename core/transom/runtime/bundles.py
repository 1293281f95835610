"""Bundles: compiled models as folders that can be carried to another machine. Their manifest, writing one in one step,
and checking one before anything in it is opened.

`docs/bundles.md` describes the folder for whoever reads it without Transom. On the warm path: imports nothing heavy.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.artifacts import FileRecord, Origin, Overflow, artifact_key, hash_file
from transom.artifacts.entries import SCRATCH, check_file_name
from transom.artifacts.files import (
    MARK,
    Hold,
    delete,
    hold,
    is_left_over,
    sync_file,
    sync_folder,
    unique,
    write_durably,
)
from transom.contract import Artifact, Device
from transom.errors import OptionError, SourceError, TransomError
from transom.hardware.probe_file import from_json, to_json
from transom.runtime.prepared import Prepared
from transom.signature import Decoder
from transom.sources import bundle_at
from transom.sources.resolve import BUNDLE_KEY, BUNDLE_MANIFEST

if TYPE_CHECKING:
    from transom.artifacts import Cache
    from transom.contract import Progress

VERSION = 1
"""Of the manifest. Rises when a reader of the old one would misread the new one; keys are added without that."""
GOLDEN = "golden.npz"
ARTIFACT = "artifact"
"""The folder of the backend's own files."""

_STAGING = ".transom"
_NO_LINK = frozenset(
    {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
)
"""What linking a file fails with where files have to be copied."""


class BundleError(TransomError):
    """A bundle cannot be written, or what is there is damaged, changed, or of a newer Transom."""


@dataclass(frozen=True)
class Manifest:
    """What a bundle says about itself; `docs/bundles.md` explains each field."""

    transom: str
    created: str
    name: str
    kind: str
    fingerprint: str
    graph: str
    foreign: bool
    license: str | None
    model_notes: tuple[str, ...]
    backend: str
    backend_version: str
    distribution: str
    target: Device
    requires: Mapping[str, str]
    options: Mapping[str, Any]
    """`precision`, `context` (None: the model's own) and `sparsity` (canonical), as they were asked for."""
    precision: str
    exact: bool
    notes: tuple[str, ...]
    decomposed: tuple[str, ...]
    context: int
    memory: Mapping[str, int]
    decoder: Decoder | None
    inputs: Mapping[str, tuple[str, tuple[int | str | None, ...]]]
    tokens: tuple[int, ...]
    best: tuple[int, ...]
    files: Mapping[str, FileRecord]

    def to_json(self) -> dict[str, Any]:
        return {
            BUNDLE_KEY: VERSION,
            "transom": self.transom,
            "created": self.created,
            "model": {
                "name": self.name,
                "kind": self.kind,
                "fingerprint": self.fingerprint,
                "graph": self.graph,
                "own_operators": self.foreign,
                "license": self.license,
                "notes": list(self.model_notes),
            },
            "backend": {"name": self.backend, "version": self.backend_version, "distribution": self.distribution},
            "target": _device_to_json(self.target),
            "requires": dict(self.requires),
            "options": dict(self.options),
            "precision": self.precision,
            "exact": self.exact,
            "notes": list(self.notes),
            "decomposed": list(self.decomposed),
            "context": self.context,
            "memory": dict(self.memory),
            "decoder": None if self.decoder is None else json.loads(self.decoder.to_json()),
            "inputs": {name: [dtype, list(shape)] for name, (dtype, shape) in self.inputs.items()},
            "expected": {"file": GOLDEN, "tokens": list(self.tokens), "best": list(self.best)},
            "files": {name: asdict(record) for name, record in self.files.items()},
        }

    @classmethod
    def from_json(cls, whole: Any) -> Manifest:
        """Raises KeyError, TypeError, ValueError or OptionError for what `to_json` did not write."""
        model, backend, expected, decoder = whole["model"], whole["backend"], whole["expected"], whole["decoder"]
        options = {name: whole["options"][name] for name in ("precision", "context", "sparsity")}
        if not isinstance(options["precision"], str) or not isinstance(options["sparsity"], str):
            raise TypeError("options")
        context = options["context"]
        if context is not None and (type(context) is not int or context < 1):
            raise ValueError("context")
        return cls(
            transom=str(whole["transom"]),
            created=str(whole["created"]),
            name=str(model["name"]),
            kind=str(model["kind"]),
            fingerprint=str(model["fingerprint"]),
            graph=str(model["graph"]),
            foreign=bool(model["own_operators"]),
            license=None if model["license"] is None else str(model["license"]),
            model_notes=tuple(map(str, model["notes"])),
            backend=str(backend["name"]),
            backend_version=str(backend["version"]),
            distribution=str(backend["distribution"]),
            target=from_json({"devices": [whole["target"]]}, BUNDLE_MANIFEST)[0],
            requires={str(name): str(value) for name, value in whole["requires"].items()},
            options=options,
            precision=str(whole["precision"]),
            exact=bool(whole["exact"]),
            notes=tuple(map(str, whole["notes"])),
            decomposed=tuple(map(str, whole["decomposed"])),
            context=int(whole["context"]),
            memory={str(name): int(value) for name, value in whole["memory"].items()},
            decoder=None if decoder is None else Decoder.from_json(json.dumps(decoder)),
            inputs={name: (str(dtype), tuple(shape)) for name, (dtype, shape) in whole["inputs"].items()},
            tokens=tuple(map(int, expected["tokens"])),
            best=tuple(map(int, expected["best"])),
            files={
                check_file_name(name): FileRecord(int(f["bytes"]), str(f["blake2b"]))
                for name, f in whole["files"].items()
            },
        )


def _device_to_json(device: Device) -> Any:
    devices: Any = to_json([device])["devices"]
    return devices[0]


# -------------------------------------------------------------------------------------------------------------- reading


def read_manifest(folder: Path) -> Manifest:
    """What a bundle says about itself. Nothing else in it is looked at.

    Raises:
        BundleError: it cannot be read, is damaged, or is of a newer version.
    """
    damaged = f"The manifest of the bundle {folder} is damaged"
    try:
        whole = json.loads((folder / BUNDLE_MANIFEST).read_bytes())
        version = whole[BUNDLE_KEY]
        if not isinstance(version, int) or version < 1:
            raise BundleError(damaged, _AGAIN)
        if version > VERSION:
            raise BundleError(
                f"The bundle {folder} is of version {version}, and this Transom reads version {VERSION}",
                "Update it with: pip install --upgrade transom",
            )
        return Manifest.from_json(whole)
    except OSError as error:
        raise BundleError(f"The bundle {folder} cannot be read: {error.strerror or error}", _AGAIN) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OptionError) as error:
        raise BundleError(damaged, _AGAIN) from error


_AGAIN = "Copy it again from where it was made, or export the model again"


class Bundle:
    """A bundle whose files are all there and as they were written. Held until `release`.

    It is what an artifact and a prepared source of the cache are elsewhere (`prepared.Compiled`, `prepared.Files`).
    What is found out about it is kept in the cache of this machine, and nothing is ever written into its folder.
    """

    def __init__(self, folder: Path, manifest: Manifest, key: str, cache: Cache) -> None:
        self.folder, self.manifest, self.key = folder, manifest, key
        self._cache = cache
        self._places: set[str] = set()
        self._hold: Hold | None = None
        self._overflow: Overflow | None = None
        inside = {n.removeprefix(f"{ARTIFACT}/"): p for n, p in self.files.items() if n.startswith(f"{ARTIFACT}/")}
        self.artifact = Artifact(inside, manifest.requires, manifest.notes)
        self.origin = Origin(
            source=manifest.name,
            backend=manifest.backend,
            backend_version=manifest.backend_version,
            options=manifest.options,
            ingredients={"exact": manifest.exact, "decomposed": list(manifest.decomposed)},
        )

    @property
    def files(self) -> dict[str, Path]:
        return {name: self.folder / name for name in self.manifest.files}

    def read(self, name: str) -> bytes:
        return self.files[name].read_bytes()

    @property
    def source(self) -> Prepared:
        """What a source would bring besides the graph."""
        m = self.manifest
        return Prepared(m.name, m.kind, m.model_notes, m.decoder, m.graph, m.inputs, self, m.foreign)

    def golden(self) -> dict[str, Any]:
        """The reference's answers: `ids` and `logits`; of a graph that is no decoder its outputs."""
        import io

        import numpy as np

        with np.load(io.BytesIO(self.read(GOLDEN)), allow_pickle=False) as stored:
            return dict(stored.items())

    @property
    def scratch(self) -> Path:
        """The folder for `Backend.load`, in the cache; a temporary one where that cannot be written."""
        if self._overflow is None:
            folder = self._cache.root / SCRATCH / self.key
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._hold = self._hold or hold(folder, create=True)
                os.utime(folder / MARK)
                return folder
            except OSError:
                self._overflow = Overflow()
        folder = self._overflow.root / SCRATCH / self.key
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def verdict(self, where: str) -> object:
        self._places.add(where)
        return self._cache.recall(_NOTEBOOK, self._verdict_key(where))

    def record_verdict(self, where: str, verdict: object) -> None:
        self._cache.remember(_NOTEBOOK, self._verdict_key(where), verdict)

    def discard(self, reason: str) -> None:
        """Forget the verdicts that were asked for: what they said is not so any more. Its files stay."""
        for where in self._places:
            self._cache.remember(_NOTEBOOK, self._verdict_key(where), None)

    def release(self) -> None:
        if self._hold is not None:
            self._hold.release()
        self._hold = self._overflow = None  # it may be opened again, and its folder must be held then

    def _verdict_key(self, where: str) -> str:
        return artifact_key({"bundle": self.key, "place": where})


_NOTEBOOK = "bundles"


def open_bundle(folder: Path, cache: Cache, progress: Progress | None = None) -> Bundle:
    """A bundle, once each of its files is seen to be there and as it was written.

    A file's hash is computed the first time, and when its size, time or inode has changed since.

    Raises:
        BundleError: a file is missing, cut, altered or no plain file, or there is one that does not belong to it.
    """
    manifest = read_manifest(folder)
    found = _files_in(folder)
    if foreign := sorted(found - manifest.files.keys()):
        raise BundleError(
            f"The bundle {folder} holds the file {foreign[0]}, which is not a part of it",
            "Remove what does not belong there, or copy the bundle again",
        )
    for name, record in manifest.files.items():
        if doubt := _doubt(folder / name, record, cache, progress) if name in found else "is missing":
            raise BundleError(f"The file {name} of the bundle {folder} {doubt}", _AGAIN)
    return Bundle(folder, manifest, artifact_key({"bundle": (folder / BUNDLE_MANIFEST).read_bytes()}), cache)


def _doubt(path: Path, record: FileRecord, cache: Cache, progress: Progress | None) -> str:
    """What is wrong with a file; empty where nothing is."""
    try:
        state = path.lstat()
        if not stat.S_ISREG(state.st_mode):
            return "is not a plain file"
        if state.st_size != record.bytes:
            return f"has {state.st_size} bytes in place of {record.bytes}"
        if cache.content_hash(path, progress) != record.blake2b:
            return "is not as it was written: its hash is another"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    except SourceError as error:
        return f"cannot be read: {error.cause}"
    return ""


def _files_in(folder: Path) -> set[str]:
    """Every file below, links included, as the manifest names them, without the manifest."""
    found = set()
    for parent, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        found |= {Path(parent, name).relative_to(folder).as_posix() for name in [*names, *links]}
    return found - {BUNDLE_MANIFEST}


# -------------------------------------------------------------------------------------------------------------- writing


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
    try:  # permissions do not tell: of file systems that are read-only or kept by the kernel
        os.rmdir(tempfile.mkdtemp(prefix=".transom-", dir=folder.parent))
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
    if foreign := sorted(_files_in(folder) - read_manifest(folder).files.keys()):
        raise OptionError(
            f"The bundle in {folder} cannot be overwritten: {foreign[0]} is not a part of it",
            "Take that file away first",
        )


def write_bundle(
    folder: Path,
    files: Mapping[str, bytes | Path],
    manifest: Callable[[Mapping[str, FileRecord]], Manifest],
    *,
    take: Callable[[], bool] | None,
    overwrite: bool,
    progress: Progress,
) -> Manifest:
    """Write a bundle, whole or not at all: beside its place first, and renamed when all of it is on the disk.

    Args:
        files: content or path by name.
        manifest: makes the manifest, once sizes and hashes are known.
        take: removes the folder that the backend's files are in, and says whether it went. With it they move, where the
            file system allows that; None, and where it stays: they are copied, since ONNX refuses weights that have two
            names.

    Raises:
        OptionError: as `require_free`.
        BundleError: the disk is full, or cannot be written.
    """
    try:
        with _staging(folder) as staging:
            new, records, linked = staging / "new", {}, []
            new.mkdir()
            for done, (name, content) in enumerate(files.items()):
                progress("write", done / len(files))
                target = new / check_file_name(name)
                target.parent.mkdir(parents=True, exist_ok=True)
                if take is not None and name.startswith(f"{ARTIFACT}/") and _link(content, target):
                    linked.append(target)
                else:
                    _copy(content, target)
                records[name] = FileRecord(target.stat().st_size, hash_file(target))
            made = manifest(records)
            write_durably(new / BUNDLE_MANIFEST, json.dumps(made.to_json(), indent=1, allow_nan=False).encode() + b"\n")
            for parent in {new, *((new / name).parent for name in files)}:
                sync_folder(parent)
            progress("write", 1.0)
            require_free(folder, overwrite=overwrite)  # it has been long since somebody looked
            if take is not None and linked and not take():
                for target in linked:
                    _separate(target, staging / "copy")
            _publish(new, folder, staging / _REPLACED)
            return made
    except OSError as error:
        raise BundleError(
            f"The bundle {folder} cannot be written: {error.strerror or error}",
            "Free space there, or choose another folder",
        ) from error


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
    held = hold(staging, create=True)
    try:
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
