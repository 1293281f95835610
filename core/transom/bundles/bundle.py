"""A bundle on disk. Its files are checked before any of them is opened. On the warm path: imports nothing heavy."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from transom.artifacts import FileRecord, Origin, TemporaryCache, artifact_key, hash_file
from transom.artifacts.entries import SCRATCH
from transom.artifacts.files import MARK, FolderLock, lock_folder
from transom.bundles import manifest_values as values
from transom.bundles.manifest import COPY_AGAIN, REFERENCE_FILE, BundleError, BundleManifest, Variant, read_manifest
from transom.contract import Artifact
from transom.errors import SourceError
from transom.preparation.cached_source import CachedSource
from transom.sources.resolve import BUNDLE_MANIFEST

if TYPE_CHECKING:
    from transom.artifacts import Cache
    from transom.contract import Progress
    from transom.text import ChatTemplate, GenerationDefaults, Tokenizer

T = TypeVar("T")


class Bundle:
    """A bundle whose files have been checked, with one variant selected. Its scratch folder is held until `release`.

    It is a `CompiledModel`, and the `Files` of its source. Verdicts are kept in the cache of this machine; nothing is
    written into the bundle.

    Args:
        variant: the selected variant.
    """

    def __init__(self, folder: Path, manifest: BundleManifest, key: str, cache: Cache, variant: Variant) -> None:
        self.folder, self.manifest, self.variant = folder, manifest, variant
        self.key = key if len(manifest.variants) == 1 else artifact_key({"bundle": key, "variant": variant.name})
        self._whole, self._cache = key, cache
        self._places: set[str] = set()
        self._lock: FolderLock | None = None
        self._temporary: TemporaryCache | None = None
        inside = {name: folder / path for name, path in variant.files.items()}
        self.artifact = Artifact(inside, variant.requires, variant.notes)
        self.origin = Origin(
            source=manifest.name,
            backend=variant.backend,
            backend_version=variant.backend_version,
            options=manifest.options,
            ingredients={
                "exact": variant.exact,
                "divergence": variant.divergence,
                "decomposed": list(variant.decomposed),
            },
        )

    def of(self, variant: Variant) -> Bundle:
        """The same bundle with another variant selected."""
        return Bundle(self.folder, self.manifest, self._whole, self._cache, variant)

    @property
    def files(self) -> dict[str, Path]:
        """Every file of the bundle by its name in the manifest."""
        return {name: self.folder / name for name in self.manifest.files}

    def read(self, name: str) -> bytes:
        return self.files[name].read_bytes()

    @property
    def source(self) -> CachedSource:
        """The source's parts other than the graph."""
        m = self.manifest
        return _Source(m.name, m.kind, m.model_notes, m.decoder, m.graph, m.inputs, self, m.uses_plugin_operators)

    def reference_outputs(self) -> dict[str, Any]:
        """The reference outputs: `ids` and `logits`, or the outputs by name of a graph that is not a decoder.

        Raises:
            BundleError: they do not match the manifest.
        """
        from transom.preparation import reference_outputs

        damaged = BundleError(f"The file {REFERENCE_FILE} of the bundle {self.folder} is damaged", COPY_AGAIN)
        try:
            found = reference_outputs.from_npz(self.read(REFERENCE_FILE), self.manifest.decoder)
        except (OSError, ValueError) as error:
            raise damaged from error
        if self.manifest.decoder is not None and found["ids"].tolist() != list(self.manifest.tokens):
            raise damaged
        return found

    @property
    def scratch(self) -> Path:
        """The scratch folder for `Backend.load`, in the cache; a temporary one if the cache cannot be written."""
        if self._temporary is None:
            folder = self._cache.root / SCRATCH / self.key
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._lock = self._lock or lock_folder(folder, create=True)
                os.utime(folder / MARK)
                return folder
            except OSError:
                self._temporary = TemporaryCache()
        folder = self._temporary.root / SCRATCH / self.key
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def verdict(self, where: str, kind: type[T]) -> T | None:
        self._places.add(where)
        return self._cache.recall(_VERDICTS, self._verdict_key(where), kind)

    def record_verdict(self, where: str, verdict: object) -> None:
        self._cache.remember(_VERDICTS, self._verdict_key(where), verdict)

    def discard(self, reason: str) -> None:
        """Forget the verdicts that were read, because they no longer hold. The files stay."""
        for where in self._places:
            self._cache.remember(_VERDICTS, self._verdict_key(where), None)

    def release(self) -> None:
        if self._lock is not None:
            self._lock.release()
        self._lock = self._temporary = None  # opening it again must hold the folder again

    def _verdict_key(self, where: str) -> str:
        return artifact_key({"bundle": self.key, "place": where})


_VERDICTS = "bundles"


class _Source(CachedSource):
    """The source of a bundle. Its errors name the damaged file."""

    files: Bundle

    def tokenizer(self) -> Tokenizer | None:
        return self._sound("tokenizer.json", super().tokenizer)

    def chat_template(self) -> ChatTemplate | None:
        return self._sound("chat_template.json", super().chat_template)

    def generation(self) -> GenerationDefaults:
        return self._sound("generation.json", super().generation)

    def _sound(self, name: str, read: Callable[[], T]) -> T:
        try:
            return read()
        except (*values.MALFORMED, SourceError) as error:
            raise BundleError(f"The file {name} of the bundle {self.files.folder} is damaged", COPY_AGAIN) from error


def open_bundle(folder: Path, cache: Cache, progress: Progress | None = None, *, known: bool = True) -> Bundle:
    """Open a bundle after checking each of its files against the manifest.

    Args:
        known: whether to use remembered hashes of files whose size, time and inode have not changed. If not, every hash
            is computed.

    Raises:
        BundleError: a file is missing, truncated, altered or not a plain file, or does not belong to the bundle.
    """
    manifest = read_manifest(folder)
    found = files_in(folder)
    hash_of = cache.content_hash if known else hash_file
    if foreign := sorted(found - manifest.files.keys()):
        raise BundleError(
            f"The bundle {folder} holds the file {foreign[0]}, which is not a part of it",
            "Remove what does not belong there, or copy the bundle again",
        )
    for name, record in manifest.files.items():
        if damage := _damage(folder / name, record, hash_of, progress) if name in found else "is missing":
            raise BundleError(f"The file {name} of the bundle {folder} {damage}", COPY_AGAIN)
    key = artifact_key({"bundle": (folder / BUNDLE_MANIFEST).read_bytes()})
    return Bundle(folder, manifest, key, cache, manifest.variants[0])


def _damage(
    path: Path, record: FileRecord, hash_of: Callable[[Path, Progress | None], str], progress: Progress | None
) -> str:
    """What is wrong with a file; empty if nothing is."""
    try:
        state = path.lstat()
        if not stat.S_ISREG(state.st_mode):
            return "is not a plain file"
        if state.st_size != record.bytes:
            return f"has {state.st_size} bytes in place of {record.bytes}"
        if hash_of(path, progress) != record.blake2b:
            return "has been altered: its hash differs from the manifest's"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    except SourceError as error:
        return f"cannot be read: {error.cause}"
    return ""


def files_in(folder: Path) -> set[str]:
    """Every file and link in a bundle, by its name in the manifest, without the manifest itself."""
    found = set()
    for parent, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        found |= {Path(parent, name).relative_to(folder).as_posix() for name in [*names, *links]}
    return found - {BUNDLE_MANIFEST}
