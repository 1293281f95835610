"""An artifact in its own folder, and a session over it with as many sequences as are measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from unittest import mock

from rtx_parts.card import BACKEND
from transom.contract import Artifact, Device, Session
from transom_tensorrt import loading

REQUIRES, SCRATCH = "requires.json", "scratch"


def store(artifact: Artifact, folder: Path) -> int:
    """Write an artifact to a folder; returns the bytes of its files."""
    folder.mkdir(parents=True)
    total = 0
    for name, content in artifact.files.items():
        target = folder / name
        if isinstance(content, bytes):
            target.write_bytes(content)
        else:
            shutil.move(content, target)
        total += target.stat().st_size
    (folder / REQUIRES).write_text(json.dumps(dict(artifact.requires)))
    return total


def load(folder: Path, device: Device, slots: int, scratch: Path | None = None) -> Session:
    """A session over an artifact that `store` wrote.

    Args:
        slots: sequences with caches. The backend would give them all of the card's memory, but here several models
            share it.
        scratch: the folder for the runtime's kernels; None: beside the artifact.

    Raises:
        RuntimeError: the artifact is not for this device.
        TransomError: it cannot be loaded.
    """
    files: dict[str, bytes | Path] = {p.name: p for p in folder.iterdir() if p.is_file() and p.name != REQUIRES}
    artifact = Artifact(files, json.loads((folder / REQUIRES).read_text()))
    verdict = BACKEND.check(artifact, device)
    if verdict.state != "ok":
        raise RuntimeError(f"the artifact in {folder.name} cannot be used here: {verdict.reason}")
    kept = folder / SCRATCH if scratch is None else scratch
    kept.mkdir(exist_ok=True)
    with mock.patch.object(loading, "MOST_SLOTS", slots):
        session: Session = BACKEND.load(artifact, device, {"context": None, "threads": None}, kept)
    return session
