"""The manifest of a bundle: what it says about itself. `docs/bundles.md` describes the file for other programs.

A bundle is a folder of compiled models that can be carried to another machine. On the warm path: imports nothing heavy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from transom.artifacts import FileRecord
from transom.artifacts.entries import check_file_name
from transom.bundles import manifest_values as values
from transom.contract import Device
from transom.errors import TransomError
from transom.hardware.probe_file import to_json
from transom.signature import Decoder
from transom.sources.resolve import BUNDLE_KEY, BUNDLE_MANIFEST

if TYPE_CHECKING:
    pass

T = TypeVar("T")

VERSION = 1
"""Of the manifest. Rises when a reader of the old one would misread the new one; keys are added without that."""
COPY_AGAIN = "Copy it again from where it was made, or export the model again"
"""What to do about a damaged bundle."""
REFERENCE_FILE = "golden.npz"
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
class BundleManifest:
    """What a bundle says about itself; `docs/bundles.md` explains each field."""

    transom: str
    created: str
    name: str
    kind: str
    fingerprint: str
    graph: str
    uses_plugin_operators: bool
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
                "own_operators": self.uses_plugin_operators,
                "license": self.license,
                "notes": list(self.model_notes),
            },
            "options": dict(self.options),
            "decoder": None if self.decoder is None else json.loads(self.decoder.to_json()),
            "inputs": {name: [dtype, list(shape)] for name, (dtype, shape) in self.inputs.items()},
            "expected": {"file": REFERENCE_FILE, "tokens": list(self.tokens), "best": list(self.best)},
        }

    @classmethod
    def from_json(cls, whole: Any) -> BundleManifest:
        """Raises what is in `MALFORMED` for what `to_json` did not write. Unknown keys are passed over."""
        model, expected, decoder = whole["model"], whole["expected"], whole["decoder"]
        options, context = whole["options"], whole["options"]["context"]
        files = {
            check_file_name(name): FileRecord(values.count(f["bytes"]), values.text(f["blake2b"]))
            for name, f in whole["files"].items()
        }
        variants = tuple(map(Variant.from_json, whole["variants"]))
        named = {REFERENCE_FILE, *(path for variant in variants for path in variant.files.values())}
        if not variants or len({v.name for v in variants}) < len(variants) or not named <= files.keys():
            raise ValueError("variants")
        return cls(
            transom=values.text(whole["transom"]),
            created=values.text(whole["created"]),
            name=values.text(model["name"]),
            kind=values.text(model["kind"]),
            fingerprint=values.text(model["fingerprint"]),
            graph=values.text(model["graph"]),
            uses_plugin_operators=values.flag(model["own_operators"]),
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


def read_manifest(folder: Path) -> BundleManifest:
    """What a bundle says about itself. Nothing else in it is looked at.

    Raises:
        BundleError: it cannot be read, is damaged, or is of a newer version.
    """
    try:
        whole = json.loads((folder / BUNDLE_MANIFEST).read_bytes())
        require_version(whole[BUNDLE_KEY], f"The bundle {folder}")
        return BundleManifest.from_json(whole)
    except OSError as error:
        raise BundleError(f"The bundle {folder} cannot be read: {error.strerror or error}", COPY_AGAIN) from error
    except values.MALFORMED as error:
        raise BundleError(f"The manifest of the bundle {folder} is damaged", COPY_AGAIN) from error


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
