"""The temporary folder that `compile` writes large files into."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SMALL_FILE = 8 << 20
"""Bytes."""


@contextmanager
def artifact_folder(prefix: str) -> Iterator[Path]:
    """A temporary folder for the files of an artifact.

    The folder stays until the host has moved the files out of it. It is removed if it is empty at the end, and with all
    its contents if the body raises, so that a cancelled compile leaves nothing behind.

    Args:
        prefix: start of the folder's name, for example `"transom-mine-"`.
    """
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    with suppress(OSError):  # the folder is not empty
        folder.rmdir()


def small_as_bytes(path: Path) -> bytes | Path:
    """The content of a file of at most 8 MiB, which is then removed, or the path of a larger file.

    Small models therefore leave no temporary folder behind, even where the caller of `compile` is not the host.
    """
    if path.stat().st_size > SMALL_FILE:
        return path
    content = path.read_bytes()
    path.unlink()
    return content
