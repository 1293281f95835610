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

    The folder stays for the host, which moves the files out of it. It is removed when it is left empty, and with all
    that is in it when the body raises, so that a cancelled compile leaves nothing behind.

    Args:
        prefix: begins the folder's name, as in `"transom-mine-"`.
    """
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    with suppress(OSError):  # it is not empty
        folder.rmdir()


def small_as_bytes(path: Path) -> bytes | Path:
    """The content of a file of at most 8 MiB, which is then removed; the path of a larger one.

    Small models thus leave no temporary folder to a caller of `compile` that is not the host.
    """
    if path.stat().st_size > SMALL_FILE:
        return path
    content = path.read_bytes()
    path.unlink()
    return content
