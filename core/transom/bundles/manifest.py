"""Bundles: compiled models as folders that can be carried to another machine. Their manifest, and checking one before
anything in it is opened; `transom.bundles.writing` writes them.

`docs/bundles.md` describes the folder for whoever reads it without Transom. On the warm path: imports nothing heavy.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from transom.artifacts import FileRecord, Origin, Overflow, artifact_key, hash_file
from transom.artifacts.entries import SCRATCH, check_file_name
from transom.artifacts.files import MARK, Hold, hold
from transom.bundles import manifest_values as values
from transom.contract import Artifact, Device
from transom.errors import SourceError, TransomError
from transom.hardware.probe_file import to_json
from transom.preparation.cached_source import Prepared
from transom.signature import Decoder
from transom.sources.resolve import BUNDLE_KEY, BUNDLE_MANIFEST

if TYPE_CHECKING:
    from transom.artifacts import Cache
    from transom.contract import Progress
    from transom.text import ChatTemplate, GenerationDefaults, Tokenizer

T = TypeVar("T")

VERSION = 1
"""Of the manifest. Rises when a reader of the old one would misread the new one; keys are added without that."""
GOLDEN = "golden.npz"
SHARED = "shared"
"""The folder of files that several variants may read. A backend says so by naming a file `shared/…`."""
LICENSES = "licenses"
_MEMORY = ("weights", "workspace", "cache_per_token")


class BundleError(TransomError):
    """A bundle cannot be written, or what is there is damaged, changed, or of a newer Transom."""


@dataclass(frozen=True)
class Variant:
    """What one backend compiled for one target; `docs/bundles.md` explains each field."""

    name: str
    backend: str
    backend_version: str
    distribution: str
    target: Device
    requires: Mapping[str, str]
    precision: str
    exact: bool
    notes: tuple[str, ...]
    decomposed: tuple[str, ...]
    context: int
    memory: Mapping[str, int]
    """`weights`, `workspace` and `cache_per_token` in bytes; empty for a graph that is no decoder."""
    libraries: tuple[str, ...]
    """File names of the native libraries that an app needs for it."""
    fidelity: Mapping[str, Any] | None
    """How it compared with the reference before it was written: `where`, `tokens`, `kl`, `top1`, `cosine`; None: it ran
    nowhere yet."""
    files: Mapping[str, str]
    """By the name that the backend knows: the path in the bundle."""

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "backend": {"name": self.backend, "version": self.backend_version, "distribution": self.distribution},
            "target": _device_to_json(self.target),
            "requires": dict(self.requires),
            "precision": self.precision,
            "exact": self.exact,
            "notes": list(self.notes),
            "decomposed": list(self.decomposed),
            "context": self.context,
            "memory": {**self.memory, "at": {str(n): self.needed(n) for n in self.lengths()}} if self.memory else {},
            "libraries": list(self.libraries),
            "fidelity": None if self.fidelity is None else dict(self.fidelity),
            "files": dict(self.files),
        }

    def lengths(self) -> list[int]:
        """Contexts whose memory the manifest tells: powers of two, and its own."""
        return sorted({*(n for n in (1 << k for k in range(9, 32)) if n < self.context), self.context})

    def needed(self, context: int) -> int:
        """Bytes that it was planned to take with one sequence of so many tokens."""
        memory = self.memory
        return memory["weights"] + memory["workspace"] + context * memory["cache_per_token"]

    @classmethod
    def from_json(cls, whole: Any) -> Variant:
        """Raises what is in `MALFORMED` for what `to_json` did not write. Unknown keys are passed over."""
        backend, fidelity, memory = whole["backend"], whole["fidelity"], whole["memory"]
        if fidelity is not None and not isinstance(fidelity, dict):
            raise TypeError("fidelity")
        return cls(
            name=check_file_name(whole["name"]),
            backend=values.text(backend["name"]),
            backend_version=values.text(backend["version"]),
            distribution=values.text(backend["distribution"]),
            target=values.device(whole["target"]),
            requires={name: values.text(value) for name, value in whole["requires"].items()},
            precision=values.text(whole["precision"]),
            exact=values.flag(whole["exact"]),
            notes=values.texts(whole["notes"]),
            decomposed=values.texts(whole["decomposed"]),
            context=values.count(whole["context"]),
            memory={name: values.count(memory[name]) for name in _MEMORY} if memory else {},
            libraries=values.texts(whole["libraries"]),
            fidelity=fidelity,
            files={check_file_name(name): check_file_name(path) for name, path in whole["files"].items()},
        )


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
    options: Mapping[str, Any]
    """`precision`, `context` (None: the model's own) and `sparsity` (canonical), as they were asked for."""
    decoder: Decoder | None
    inputs: Mapping[str, tuple[str, tuple[int | str | None, ...]]]
    tokens: tuple[int, ...]
    best: tuple[int, ...]
    variants: tuple[Variant, ...] = ()
    files: Mapping[str, FileRecord] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            **self.head(),
            "variants": [variant.to_json() for variant in self.variants],
            "files": {name: asdict(record) for name, record in self.files.items()},
        }

    def head(self) -> dict[str, Any]:
        """All but variants and files."""
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
            "options": dict(self.options),
            "decoder": None if self.decoder is None else json.loads(self.decoder.to_json()),
            "inputs": {name: [dtype, list(shape)] for name, (dtype, shape) in self.inputs.items()},
            "expected": {"file": GOLDEN, "tokens": list(self.tokens), "best": list(self.best)},
        }

    @classmethod
    def from_json(cls, whole: Any) -> Manifest:
        """Raises what is in `MALFORMED` for what `to_json` did not write. Unknown keys are passed over."""
        model, expected, decoder = whole["model"], whole["expected"], whole["decoder"]
        options, context = whole["options"], whole["options"]["context"]
        files = {
            check_file_name(name): FileRecord(values.count(f["bytes"]), values.text(f["blake2b"]))
            for name, f in whole["files"].items()
        }
        variants = tuple(map(Variant.from_json, whole["variants"]))
        named = {GOLDEN, *(path for variant in variants for path in variant.files.values())}
        if not variants or len({v.name for v in variants}) < len(variants) or not named <= files.keys():
            raise ValueError("variants")
        return cls(
            transom=values.text(whole["transom"]),
            created=values.text(whole["created"]),
            name=values.text(model["name"]),
            kind=values.text(model["kind"]),
            fingerprint=values.text(model["fingerprint"]),
            graph=values.text(model["graph"]),
            foreign=values.flag(model["own_operators"]),
            license=None if model["license"] is None else values.text(model["license"]),
            model_notes=values.texts(model["notes"]),
            options={
                "precision": values.text(options["precision"]),
                "context": None if context is None else values.count(context, 1),
                "sparsity": values.text(options["sparsity"]),
            },
            decoder=None if decoder is None else values.decoder(decoder),
            inputs={
                name: (values.text(dtype), values.shape(shape)) for name, (dtype, shape) in whole["inputs"].items()
            },
            tokens=tuple(map(values.count, values.items(expected["tokens"]))),
            best=tuple(map(values.count, values.items(expected["best"]))),
            variants=variants,
            files=files,
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
    try:
        whole = json.loads((folder / BUNDLE_MANIFEST).read_bytes())
        require_version(whole[BUNDLE_KEY], f"The bundle {folder}")
        return Manifest.from_json(whole)
    except OSError as error:
        raise BundleError(f"The bundle {folder} cannot be read: {error.strerror or error}", AGAIN) from error
    except values.MALFORMED as error:
        raise BundleError(f"The manifest of the bundle {folder} is damaged", AGAIN) from error


def require_version(version: object, bundle: str) -> None:
    """Raises ValueError for what is no version, BundleError for a newer one than can be read.

    Args:
        bundle: what the sentence calls it.
    """
    if values.count(version, 1) > VERSION:
        raise BundleError(
            f"{bundle} is of version {version}, and this Transom reads version {VERSION}",
            "Update it with: pip install --upgrade transom",
        )


AGAIN = "Copy it again from where it was made, or export the model again"


class Bundle:
    """A bundle whose files are all there and as they were written. Held until `release`.

    It is what an artifact and a prepared source of the cache are elsewhere (`prepared.Compiled`, `prepared.Files`).
    What is found out about it is kept in the cache of this machine, and nothing is ever written into its folder.

    Args:
        variant: the one that is opened.
    """

    def __init__(self, folder: Path, manifest: Manifest, key: str, cache: Cache, variant: Variant) -> None:
        self.folder, self.manifest, self.variant = folder, manifest, variant
        self.key = key if len(manifest.variants) == 1 else artifact_key({"bundle": key, "variant": variant.name})
        self._whole, self._cache = key, cache
        self._places: set[str] = set()
        self._hold: Hold | None = None
        self._overflow: Overflow | None = None
        inside = {name: folder / path for name, path in variant.files.items()}
        self.artifact = Artifact(inside, variant.requires, variant.notes)
        self.origin = Origin(
            source=manifest.name,
            backend=variant.backend,
            backend_version=variant.backend_version,
            options=manifest.options,
            ingredients={"exact": variant.exact, "decomposed": list(variant.decomposed)},
        )

    def of(self, variant: Variant) -> Bundle:
        """The same bundle with another of its variants open."""
        return Bundle(self.folder, self.manifest, self._whole, self._cache, variant)

    @property
    def files(self) -> dict[str, Path]:
        """Of the bundle's root and below."""
        return {name: self.folder / name for name in self.manifest.files}

    def read(self, name: str) -> bytes:
        return self.files[name].read_bytes()

    @property
    def source(self) -> Prepared:
        """What a source would bring besides the graph."""
        m = self.manifest
        return _Source(m.name, m.kind, m.model_notes, m.decoder, m.graph, m.inputs, self, m.foreign)

    def golden(self) -> dict[str, Any]:
        """The reference's answers: `ids` and `logits`; of a graph that is no decoder its outputs.

        Raises:
            BundleError: they are not what the manifest says that they belong to.
        """
        import io
        import zipfile
        import zlib

        import numpy as np

        damaged = BundleError(f"The file {GOLDEN} of the bundle {self.folder} is damaged", AGAIN)
        try:
            with np.load(io.BytesIO(self.read(GOLDEN)), allow_pickle=False) as stored:
                found = dict(stored.items())
        except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise damaged from error
        if (decoder := self.manifest.decoder) is not None:
            tokens = list(self.manifest.tokens)
            sound = (
                found.keys() >= {"ids", "logits"}
                and found["ids"].tolist() == tokens != []
                and max(tokens) < decoder.vocabulary
                and found["logits"].shape == (len(tokens), decoder.vocabulary)
                and found["logits"].dtype.kind == "f"
            )
            if not sound:
                raise damaged
        return found

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


class _Source(Prepared):
    """What a bundle says of its source: texts that are not what they should be are an error that names the file."""

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
            raise BundleError(f"The file {name} of the bundle {self.files.folder} is damaged", AGAIN) from error


def open_bundle(folder: Path, cache: Cache, progress: Progress | None = None, *, known: bool = True) -> Bundle:
    """A bundle, once each of its files is seen to be there and as it was written.

    Args:
        known: a file's hash is computed the first time, and when its size, time or inode has changed since. False:
            each is computed now.

    Raises:
        BundleError: a file is missing, cut, altered or no plain file, or there is one that does not belong to it.
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
        if doubt := _doubt(folder / name, record, hash_of, progress) if name in found else "is missing":
            raise BundleError(f"The file {name} of the bundle {folder} {doubt}", AGAIN)
    key = artifact_key({"bundle": (folder / BUNDLE_MANIFEST).read_bytes()})
    return Bundle(folder, manifest, key, cache, manifest.variants[0])


def _doubt(
    path: Path, record: FileRecord, hash_of: Callable[[Path, Progress | None], str], progress: Progress | None
) -> str:
    """What is wrong with a file; empty where nothing is."""
    try:
        state = path.lstat()
        if not stat.S_ISREG(state.st_mode):
            return "is not a plain file"
        if state.st_size != record.bytes:
            return f"has {state.st_size} bytes in place of {record.bytes}"
        if hash_of(path, progress) != record.blake2b:
            return "is not as it was written: its hash is another"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    except SourceError as error:
        return f"cannot be read: {error.cause}"
    return ""


def files_in(folder: Path) -> set[str]:
    """Every file below, links included, as the manifest names them, without the manifest."""
    found = set()
    for parent, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        found |= {Path(parent, name).relative_to(folder).as_posix() for name in [*names, *links]}
    return found - {BUNDLE_MANIFEST}
