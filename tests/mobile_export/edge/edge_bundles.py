"""Bundles made by hand, as `docs/bundles.md` describes them, for the runner to read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from transom.contract import Device
from transom.hardware.probe_file import to_json

PHONE = Device(
    kind="remote",
    id="remote:snapdragon-8-gen-2",
    arch="hexagon_v73",
    memory_bytes=0,
    name="Snapdragon 8 Gen 2",
    drivers={"soc": "SM8550", "soc_model": "43", "htp_arch": "73"},
)


def variant(
    name: str,
    backend: str,
    files: Mapping[str, str],
    *,
    requires: Mapping[str, str] | None = None,
    context: int = 64,
    at: Mapping[int, int] | None = None,
    target: Device = PHONE,
) -> dict[str, Any]:
    """The object of one variant; `files` are paths in the bundle by the backend's names."""
    memory: dict[str, Any] = {"weights": 1, "workspace": 1, "cache_per_token": 1}
    if at is not None:
        memory["at"] = {str(length): count for length, count in at.items()}
    return {
        "name": name,
        "backend": {"name": backend, "version": "0.1.0", "distribution": "transom"},
        "target": device_json(target),
        "requires": dict(requires or {}),
        "precision": "",
        "exact": True,
        "notes": [],
        "decomposed": [],
        "context": context,
        "memory": memory,
        "fidelity": None,
        "files": dict(files),
    }


def device_json(device: Device) -> Any:
    devices: Any = to_json([device])["devices"]
    return devices[0]


def write_bundle(
    folder: Path,
    variants: Sequence[Mapping[str, Any]],
    files: Mapping[str, bytes],
    *,
    tokens: Sequence[int] = (),
    best: Sequence[int] = (),
) -> dict[str, Any]:
    """Write the files and the manifest, which is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    manifest = {
        "transom_bundle": 1,
        "transom": "0.1.0",
        "model": {"name": "tiny", "kind": "onnx"},
        "expected": {"file": "golden.npz", "tokens": list(tokens), "best": list(best)},
        "variants": list(variants),
        "files": {name: {"bytes": len(data), "blake2b": content_hash(data)} for name, data in files.items()},
    }
    write_manifest(folder, manifest)
    return manifest


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def content_hash(content: bytes) -> str:
    """The hash that a manifest has, as `docs/bundles.md` defines it."""
    whole = blake2b(str(len(content)).encode(), digest_size=20)
    for start in range(0, max(len(content), 1), 32 << 20):
        whole.update(blake2b(content[start : start + (32 << 20)], digest_size=32).digest())
    return whole.hexdigest()
