"""A small key-value store in one JSON file, read often, written rarely, safe between processes.

Used for measured choices, verdicts and content hashes: values that can be computed again at the cost of time.
So a store never raises for the state of the disk: an unreadable file counts as empty (one log line), a value of another
type than its reader expects counts as absent, and a value that cannot be written is kept for this process.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from transom.artifacts.files import make_private, replace_atomically
from transom.typed import WrongType, from_json, typed

T = TypeVar("T")

_log = logging.getLogger("transom.artifacts")
_LOCK_SECONDS = 10.0


class JsonStore:
    """Values by key in the JSON file `path`. Beyond `limit` keys the oldest are dropped."""

    def __init__(self, path: Path, *, limit: int = 2000) -> None:
        self.path = path
        self.limit = limit
        self.unwritable: OSError | None = None
        """Why the last `remember` or `forget` could not be written to the disk, or None."""
        self._here: dict[str, object] = {}
        self._seen: tuple[tuple[int, int, int], dict[str, object]] | None = None
        self._complained = False

    def recall(self, key: str, kind: type[T]) -> T | None:
        """The value of a key; None where there is none, or one that is not a `kind` (`transom.typed`)."""
        value = self._here[key] if key in self._here else self._read().get(key)
        if value is None:
            return None
        try:
            return typed(kind, value)
        except WrongType as error:
            _log.warning("what %s says of %s counts as absent: %s", self.path, key, error)
            return None

    def all(self) -> dict[str, object]:
        """All values by key."""
        return {k: v for k, v in {**self._read(), **self._here}.items() if v is not None}

    def remember(self, key: str, value: object) -> None:
        """Store a value under a key. Raises TypeError or ValueError when it is not JSON; never OSError."""
        json.dumps(value, allow_nan=False)
        try:
            with self._locked():
                facts = dict(self._read())
                facts.pop(key, None)  # written anew at the end: the order of the file is the order of age
                if value is not None:
                    facts[key] = value
                for old in list(facts)[: max(0, len(facts) - self.limit)]:
                    del facts[old]
                replace_atomically(self.path, _text(facts, key))
        except OSError as error:
            self.unwritable = error
            self._here[key] = value
            return
        self.unwritable = None
        self._here.pop(key, None)

    def forget(self, key: str) -> None:
        """Remove a key, if it is there."""
        self.remember(key, None)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        from filelock import FileLock  # takes 30 ms to import, and `recall` does not need it

        make_private(self.path.parent)
        with FileLock(self.path.with_name(self.path.name + ".lock"), timeout=_LOCK_SECONDS):
            yield

    def _read(self) -> dict[str, object]:
        try:
            with self.path.open("rb") as file:
                stat = os.fstat(file.fileno())
                state = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
                if self._seen is not None and self._seen[0] == state:
                    return self._seen[1]
                facts = from_json(dict[str, object], file.read())
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, WrongType) as error:
            if not self._complained:
                _log.warning("%s cannot be read (%s) and counts as empty", self.path, error)
                self._complained = True
            return {}
        self._complained = False
        self._seen = (state, facts)
        return facts


def _text(facts: dict[str, object], key: str) -> bytes:
    """The file's content; only this key's value where another one is nested deeper than can be written."""
    try:
        return json.dumps(facts, indent=1).encode()
    except RecursionError:
        return json.dumps({name: value for name, value in facts.items() if name == key}, indent=1).encode()
