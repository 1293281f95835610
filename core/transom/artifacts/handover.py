"""Artifacts between processes: the compiling child spills one to disk, the host receives it. Plain JSON and files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from transom.artifacts.entries import check_file_name
from transom.contract import Artifact


def spill(artifact: Artifact, folder: Path) -> dict[str, object]:
    """Write the artifact's bytes into `folder` (a slot's `work`) and describe it in JSON types for `receive`.

    Files that the artifact gives as paths stay where they are. Raises OSError, and ValueError for a file name that
    leads out of the artifact.
    """
    files: dict[str, str] = {}
    for name, content in artifact.files.items():
        check_file_name(name)
        if isinstance(content, Path):
            files[name] = str(content.absolute())
            continue
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        files[name] = str(path.absolute())
    return {"files": files, "requires": dict(artifact.requires), "notes": list(artifact.notes)}


def receive(record: Mapping[str, object]) -> Artifact:
    """The artifact that `spill` described, every file a path. Raises ValueError when the record is not one."""
    files, requires, notes = record.get("files"), record.get("requires"), record.get("notes")
    if not isinstance(files, dict) or not isinstance(requires, dict) or not isinstance(notes, list):
        raise ValueError("not the record of an artifact")
    return Artifact(
        files={check_file_name(str(name)): Path(str(path)) for name, path in files.items()},
        requires={str(name): str(value) for name, value in requires.items()},
        notes=tuple(str(note) for note in notes),
    )
