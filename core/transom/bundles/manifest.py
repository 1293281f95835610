"""The manifest of a bundle, a folder of compiled models that can be copied to another machine.

`docs/bundles.md` describes the file for other programs. On the warm path: imports nothing heavy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transom.artifacts import FileRecord
from transom.artifacts.entries import check_file_name
from transom.bundles import manifest_values as values
from transom.contract import Device
from transom.errors import TransomError
from transom.hardware.probe_file import to_json
from transom.signature import Decoder
from transom.sources.resolve import BUNDLE_KEY, BUNDLE_MANIFEST

VERSION = 1
"""Version of the manifest. Increase it if an old reader would misread a new file; new keys do not need that."""
COPY_AGAIN = "Copy it again from where it was made, or export the model again"
"""The fix for a damaged bundle."""
REFERENCE_FILE = "golden.npz"
"""The reference outputs."""
SHARED = "shared"
"""Folder of files that several variants may share. A backend marks such a file by naming it `shared/…`."""
LICENSES = "licenses"
_MEMORY = ("weights", "workspace", "cache_per_token")


class BundleError(TransomError):
    """A bundle cannot be written, or is damaged, altered, or of a newer Transom."""


@dataclass(frozen=True)
class Variant:
    """The model compiled by one backend for one target; `docs/bundles.md` explains each field."""

    name: str
    backend: str
    backend_version: str
    distribution: str
    target: Device
    requires: Mapping[str, str]
    precision: str
    exact: bool
    divergence: float | None
    """What the backend declared for approximate claims, nats; None if nothing."""
    notes: tuple[str, ...]
    decomposed: tuple[str, ...]
    context: int
    memory: Mapping[str, int]
    """`weights`, `workspace` and `cache_per_token` in bytes; empty for a graph that is not a decoder."""
    libraries: tuple[str, ...]
    """File names of the native libraries that an app needs."""
    fidelity: Mapping[str, Any] | None
    """Comparison with the reference at export: `where`, `tokens`, `kl`, `top1`, `cosine`; None if there was none."""
    files: Mapping[str, str]
    """The backend's name of a file -> its path in the bundle."""

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "backend": {"name": self.backend, "version": self.backend_version, "distribution": self.distribution},
            "target": _device_to_json(self.target),
            "requires": dict(self.requires),
            "precision": self.precision,
            "exact": self.exact,
            "divergence": self.divergence,
            "notes": list(self.notes),
            "decomposed": list(self.decomposed),
            "context": self.context,
            "memory": {**self.memory, "at": {str(n): self.needed(n) for n in self.lengths()}} if self.memory else {},
            "libraries": list(self.libraries),
            "fidelity": None if self.fidelity is None else dict(self.fidelity),
            "files": dict(self.files),
        }

    def lengths(self) -> list[int]:
        """Contexts for which the manifest lists the memory: powers of two, and the variant's own."""
        return sorted({*(n for n in (1 << k for k in range(9, 32)) if n < self.context), self.context})

    def needed(self, context: int) -> int:
        """Planned bytes for one sequence of `context` tokens."""
        memory = self.memory
        return memory["weights"] + memory["workspace"] + context * memory["cache_per_token"]

    @classmethod
    def from_json(cls, whole: Any) -> Variant:
        """Raises an error of `MALFORMED` for invalid content. Unknown keys are ignored."""
        backend, fidelity, memory = whole["backend"], whole["fidelity"], whole["memory"]
        return cls(
            name=check_file_name(whole["name"]),
            backend=values.text(backend["name"]),
            backend_version=values.text(backend["version"]),
            distribution=values.text(backend["distribution"]),
            target=values.device(whole["target"]),
            requires={name: values.text(value) for name, value in whole["requires"].items()},
            precision=values.text(whole["precision"]),
            exact=values.flag(whole["exact"]),
            divergence=None if whole.get("divergence") is None else values.number(whole["divergence"]),
            notes=values.texts(whole["notes"]),
            decomposed=values.texts(whole["decomposed"]),
            context=values.count(whole["context"]),
            memory={name: values.count(memory[name]) for name in _MEMORY} if memory else {},
            libraries=values.texts(whole["libraries"]),
            fidelity=None if fidelity is None else values.fidelity(fidelity),
            files={check_file_name(name): check_file_name(path) for name, path in whole["files"].items()},
        )


@dataclass(frozen=True)
class BundleManifest:
    """The content of a bundle's manifest; `docs/bundles.md` explains each field."""

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
    """`precision`, `context` (None: the model's own) and `sparsity` (canonical), as requested at export."""
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
        """Everything but variants and files."""
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
        """Raises an error of `MALFORMED` for invalid content. Unknown keys are ignored."""
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
        if (decoder is None) != (not expected["tokens"]) or (decoder is not None and whole["inputs"]):
            raise ValueError("decoder")  # else a model would open as a plain graph
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
    """Read the manifest of a bundle. No other file of it is read.

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
    """Raise ValueError for an invalid version, and BundleError for a newer one than this Transom reads.

    Args:
        bundle: subject of the message.
    """
    if values.count(version, 1) > VERSION:
        raise BundleError(
            f"{bundle} is of version {version}, and this Transom reads version {VERSION}",
            "Update it with: pip install --upgrade transom",
        )
