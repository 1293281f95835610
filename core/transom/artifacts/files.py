"""Files and folders that survive a crash: whole-file hashes, durable writes, and locks that keep a folder alive.

A folder that another process may remove contains a mark, the empty file `.used`. A process that uses the folder holds
a shared lock on the mark; removing the folder takes the exclusive lock. The operating system drops the locks of a
killed process, so no stale lock can block. The mark's modification time is the time of last use.
"""

from __future__ import annotations

import errno
import os
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from transom.contract import Progress

MARK = ".used"

_CHUNK = 32 << 20
_PIECE = 1 << 20
_HOLD_SECONDS = 5.0
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})


def hash_file(path: Path, progress: Progress | None = None) -> str:
    """The BLAKE2b hash of a file's whole content: 40 hexadecimal digits.

    The file is hashed in pieces of 32 MiB on up to four threads and the digests are hashed again, so the result
    differs from that of `b2sum`. Raises OSError when the file cannot be read.
    """
    from hashlib import blake2b

    size = path.stat().st_size
    count = max(1, -(-size // _CHUNK))
    whole = blake2b(str(size).encode(), digest_size=20)
    if count == 1:
        whole.update(_hash_chunk(path, 0))
        return whole.hexdigest()

    from concurrent.futures import ThreadPoolExecutor

    pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="transom-hash")
    try:
        for index, digest in enumerate(pool.map(lambda i: _hash_chunk(path, i * _CHUNK), range(count))):
            whole.update(digest)
            if progress is not None:
                progress("hash", (index + 1) / count)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return whole.hexdigest()


def _hash_chunk(path: Path, offset: int) -> bytes:
    from hashlib import blake2b

    digest = blake2b(digest_size=32)
    left = _CHUNK
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while left and (piece := file.read(min(_PIECE, left))):
            digest.update(piece)
            left -= len(piece)
    return digest.digest()


def make_private(folder: Path) -> None:
    """Create a folder and its parents, as far as they are missing, that only their owner can enter. Raises OSError."""
    if not folder.is_dir():
        if os.path.lexists(folder):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
        make_private(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)


def unique(name: str) -> str:
    """`name` with a suffix that no other process or thread uses."""
    return f"{name}-{os.getpid()}-{os.urandom(6).hex()}"


def write_durably(path: Path, data: bytes) -> None:
    """Write a new file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replacing(path: Path, *, private: bool = False) -> Iterator[BinaryIO]:
    """A file to write to that replaces `path` at the end of the `with`, or is deleted if that fails. Readers see the
    old content or the new, never a part. A private file can only be read by its owner. Raises OSError."""
    temporary = path.with_name("." + unique(path.name))
    try:
        with open(temporary, "wb", opener=_open_privately if private else None) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _open_privately(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def replace_atomically(path: Path, data: bytes) -> None:
    """Write a file so that readers see the old content or the new, never a part. Raises OSError."""
    with replacing(path) as file:
        file.write(data)


def _replace(source: Path, target: Path) -> None:
    for attempt in range(20):
        try:
            os.replace(source, target)
            return
        except PermissionError:  # Windows: a reader has the target open for a moment
            if sys.platform != "win32" or attempt == 19:
                raise
            time.sleep(0.01)


def sync_file(path: Path) -> None:
    """Wait until a file's content is on the disk. Some file systems report only here that they are full."""
    fd = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_folder(path: Path) -> None:
    """Wait until a folder's entries are on the disk, if the system supports that."""
    if sys.platform == "win32":
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NO_LOCKS:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(fd)


def folder_size(path: Path) -> int:
    """Bytes of all files below `path`, or of the file `path`. Files that vanish while counting are skipped."""
    total = path.lstat().st_size if path.is_file() else 0
    for parent, _, names in os.walk(path):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue
    return total


class FolderLock:
    """A shared lock on a folder's mark. Ends with `release`, with the object, or with the process."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._close = weakref.finalize(self, os.close, fd)

    def is_at(self, folder: Path) -> bool:
        """Whether the folder at this path is still the locked one."""
        return self._close.alive and _is_at(self._fd, folder / MARK)

    def release(self) -> None:
        self._close()


def lock_folder(folder: Path, *, create: bool = False) -> FolderLock | None:
    """Lock a folder so that no other process removes it. None when it is gone or has no mark.

    `create` creates the mark. Raises OSError, as when the mark may not be read or a remover keeps its lock on it.
    """
    mark = folder / MARK
    flags = os.O_RDWR | os.O_CREAT if create else os.O_RDONLY
    deadline = time.monotonic() + _HOLD_SECONDS
    while True:
        try:
            fd = os.open(mark, flags | getattr(os, "O_CLOEXEC", 0), 0o666)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if _lock(fd, shared=True):
            if _is_at(fd, mark):
                return FolderLock(fd)
            os.close(fd)  # another process replaced the folder meanwhile: look again
        else:
            os.close(fd)
            if time.monotonic() > deadline:
                raise TimeoutError(errno.ETIMEDOUT, "another process does not release it", str(mark))
            time.sleep(0.005)


def is_locked(folder: Path) -> bool:
    """Whether any process, this one included, has locked the folder."""
    try:
        fd = os.open(folder / MARK, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not _lock(fd, shared=False)
    finally:
        os.close(fd)


def is_left_over(folder: Path) -> bool:
    """Whether a folder was left by a killed process of this user: it has a mark and no lock.

    The owner is checked first, because another user's folder may not be readable.
    """
    try:
        mine = not hasattr(os, "getuid") or folder.lstat().st_uid == os.getuid()
        return mine and not folder.is_symlink() and (folder / MARK).exists() and not is_locked(folder)
    except OSError:  # another process sweeps too
        return False


def remove_unless_locked(folder: Path, trash: Path, *, unmarked_age: float = 0.0) -> bool:
    """Remove a folder that is not locked: rename it into `trash`, then delete it. False when it has to stay.

    A folder without a mark is removed only when it is older than `unmarked_age` seconds: it may be about to get one.
    """
    mark = folder / MARK
    try:
        fd = os.open(mark, os.O_RDONLY)
    except NotADirectoryError:
        return False
    except FileNotFoundError:
        try:
            young = time.time() - folder.stat().st_mtime < unmarked_age
        except FileNotFoundError:
            return False
        return not young and move_aside(folder, trash)
    try:
        if not _lock(fd, shared=False) or not _is_at(fd, mark):
            return False
        if sys.platform != "win32":  # a folder with an open file in it cannot be renamed there
            return move_aside(folder, trash)
    finally:
        os.close(fd)
    return move_aside(folder, trash)


def move_aside(folder: Path, trash: Path) -> bool:
    """Rename a folder into `trash`, then delete it as far as possible. False when it could not be renamed."""
    target = trash / unique(folder.name)
    try:
        trash.mkdir(parents=True, exist_ok=True)
        os.rename(folder, target)
    except OSError:
        return False
    delete(target)
    return True


def delete(path: Path) -> None:
    """Delete a file or a folder as far as possible."""
    import shutil
    from contextlib import suppress

    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):
        path.unlink()


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except (FileNotFoundError, NotADirectoryError):
        return False


if sys.platform == "win32":

    def _lock(fd: int, *, shared: bool) -> bool:
        return True  # an open handle is the lock: the folder around it cannot be renamed or removed

else:
    import fcntl

    def _lock(fd: int, *, shared: bool) -> bool:
        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return shared  # no locks on this file system: shared use is allowed, removal never
        return True
