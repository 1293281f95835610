"""Names of cache entries: the key of an artifact, the hash of a file's content, and sizes as text."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from transom.artifacts.files import hash_file
from transom.errors import OptionError, SourceError

if TYPE_CHECKING:
    from transom.artifacts.json_store import JsonStore
    from transom.contract import Progress

FORMAT = 2
"""Version of the layout on disk. Part of every key, so that versions with different layouts can share a cache."""

_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?")
_SETTLED_NS = 2_000_000_000


class KnownHash(TypedDict):
    """A remembered hash."""

    mark: str
    """Size, modification time and inode of the file that was hashed."""
    hash: str


def artifact_key(ingredients: Mapping[str, object]) -> str:
    """The key of an artifact with these ingredients: 40 hexadecimal digits.

    `ingredients` holds strings, numbers, booleans, None, bytes, and mappings (string keys), sequences and sets of
    them; order matters only in sequences. Raises TypeError for anything else and ValueError for NaN or infinity.
    """
    return json_hash({"format": FORMAT, "of": canonical(ingredients)})


def json_hash(value: Mapping[str, object]) -> str:
    """The hash of an object in JSON types, whatever the order of its keys: 40 hexadecimal digits.

    Raises TypeError for a value that is not JSON and ValueError for NaN or infinity.
    """
    from hashlib import blake2b

    return blake2b(json.dumps(value, sort_keys=True, allow_nan=False).encode(), digest_size=20).hexdigest()


def canonical(value: object) -> object:
    """`value` in JSON types, the same for equal values. Raises TypeError if it has no such form."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"the keys of a mapping must be strings, found {key!r}")
        return {key: canonical(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [canonical(item) for item in value]
    if isinstance(value, AbstractSet):
        return {"set": sorted(json.dumps(canonical(item), sort_keys=True) for item in value)}
    raise TypeError(f"cannot be part of a key: {value!r} ({type(value).__name__})")


def check_key(key: str) -> str:
    """The key itself, if it is safe as a folder name. Raises ValueError."""
    if not _KEY.fullmatch(key):
        raise ValueError(f"not a cache key: {key!r}; letters, digits, '_', '-' and '.', at most 128 of them")
    return key


def content_hash(path: Path, memo: JsonStore, progress: Progress | None = None) -> str:
    """The hash of a file's content, computed once for each (path, size, modification time, inode).

    Raises SourceError when the file cannot be read or changes while it is read. The hash of a file modified within
    the last two seconds is not remembered: the file could change again within the resolution of its timestamp.
    """
    path = path.resolve()
    for _ in range(2):
        try:
            before = path.stat()
            mark = f"{before.st_size}:{before.st_mtime_ns}:{before.st_ino}"
            known = memo.recall(str(path), KnownHash)
            if known is not None and known["mark"] == mark:
                return known["hash"]
            settled = abs(time.time_ns() - before.st_mtime_ns) > _SETTLED_NS
            value = hash_file(path, progress)
            after = path.stat()
        except OSError as error:
            raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error
        if mark == f"{after.st_size}:{after.st_mtime_ns}:{after.st_ino}":
            if settled:
                memo.remember(str(path), {"mark": mark, "hash": value})
            return value
    raise SourceError(f"{path} changes while it is read", "Wait until it is written completely and try again")


def parse_size(text: str, name: str = "size") -> int | None:
    """Bytes from "20GB" (10^9 each), "512MiB" (2^20 each) or "1500000"; None for "unlimited". Raises OptionError."""
    word = text.strip().upper()
    if word in ("UNLIMITED", "NONE"):
        return None
    match = _SIZE.fullmatch(word)
    if match is None:
        raise OptionError(f'{name} is "{text}", which is not a size', 'Write "10GB", "512MiB" or "unlimited"')
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit or " "))
