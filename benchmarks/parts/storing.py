"""Stores a compiled artifact where the host would store it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from transom.contract import Artifact


def stored(artifact: Artifact, folder: Path) -> Artifact:
    """The same artifact with every file as a path in `folder`; files that it had elsewhere are moved."""
    files: dict[str, bytes | Path] = {}
    for name, content in artifact.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            shutil.move(content, path)
            if not any(content.parent.iterdir()):
                content.parent.rmdir()
        else:
            path.write_bytes(content)
        files[name] = path
    return replace(artifact, files=files)
