"""Hashes of samples of a file, which find most changes of its content in less than a millisecond.

A file system may not record a change: bit rot, an image of a disk that was put back, a program that sets the times. The
positions are drawn when a file is hashed in full, and stay until it is again.
"""

from __future__ import annotations

import os
from pathlib import Path

PIECE = 4096
"""Bytes of a sample, at a multiple of it: a page of memory."""
PIECES = 32
"""Samples of a file. A file that is not larger than all of them is hashed in full."""

Samples = list[tuple[int, str]]
"""Offsets, and the BLAKE2b hashes of the bytes there."""


def take_samples(path: Path) -> Samples:
    """Samples of a file: its first and last bytes, and others at random. Raises OSError."""
    size = path.stat().st_size
    if size <= PIECE * PIECES:
        offsets = list(range(0, size, PIECE))
    else:
        import random  # a warm start compares samples, and takes none

        pieces = -(-size // PIECE)
        chosen = {0, pieces - 1, *random.SystemRandom().sample(range(pieces), PIECES - 2)}
        offsets = [piece * PIECE for piece in sorted(chosen)]
    return list(zip(offsets, _hash(path, offsets), strict=True))


def same_samples(path: Path, samples: Samples) -> bool:
    """Whether the file has the bytes that the samples were taken of. Raises OSError."""
    return _hash(path, [offset for offset, _ in samples]) == [digest for _, digest in samples]


def _hash(path: Path, offsets: list[int]) -> list[str]:
    from hashlib import blake2b

    found = []
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        for offset in offsets:
            os.lseek(fd, offset, os.SEEK_SET)
            found.append(blake2b(os.read(fd, PIECE), digest_size=8).hexdigest())
    finally:
        os.close(fd)
    return found
