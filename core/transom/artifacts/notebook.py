"""A small store of remembered facts: one JSON file, read often, written rarely, safe between processes.

Used for measured choices, verdicts and content hashes: things that cost time to find out again and nothing else.
So a notebook never raises for the state of the disk: an unreadable file is an empty notebook (one log line), and
what cannot be written is remembered for this process.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transom.artifacts.files import replace_atomically

_log = logging.getLogger("transom.artifacts")
_LOCK_SECONDS = 10.0


class Notebook:
    """Facts by key, in the JSON file `path`; the oldest are dropped beyond `limit`."""

    def __init__(self, path: Path, *, limit: int = 2000) -> None:
        self.path = path
        self.limit = limit
        self.unwritable: OSError | None = None
        """Why the last `remember` or `forget` stayed in this process, or None when it reached the disk."""
        self._here: dict[str, object] = {}
        self._seen: tuple[tuple[int, int, int], dict[str, object]] | None = None
        self._complained = False

    def recall(self, key: str) -> object:
        """The remembered value (JSON types), or None."""
        if key in self._here:
            return self._here[key]
        return self._read().get(key)

    def all(self) -> dict[str, object]:
        """Everything remembered."""
        return {k: v for k, v in {**self._read(), **self._here}.items() if v is not None}

    def remember(self, key: str, value: object) -> None:
        """Keep a value under a key. Raises TypeError or ValueError when it is not JSON; never OSError."""
        json.dumps(value, allow_nan=False)
        try:
            with self._locked():
                facts = dict(self._read())
                facts.pop(key, None)  # written anew at the end: the order of the file is the order of age
                if value is not None:
                    facts[key] = value
                for old in list(facts)[: max(0, len(facts) - self.limit)]:
                    del facts[old]
                replace_atomically(self.path, json.dumps(facts, indent=1).encode())
        except OSError as error:
            self.unwritable = error
            self._here[key] = value
            return
        self.unwritable = None
        self._here.pop(key, None)

    def forget(self, key: str) -> None:
        """Drop a key; one that is not there is no error."""
        self.remember(key, None)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        from filelock import FileLock  # costs 30 ms to import; recalling does without

        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_name(self.path.name + ".lock"), timeout=_LOCK_SECONDS):
            yield

    def _read(self) -> dict[str, object]:
        try:
            with self.path.open("rb") as file:
                stat = os.fstat(file.fileno())
                state = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
                if self._seen is not None and self._seen[0] == state:
                    return self._seen[1]
                facts = json.loads(file.read())
            if not isinstance(facts, dict):
                raise ValueError("not an object")
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError, RecursionError) as error:
            if not self._complained:
                _log.warning("%s cannot be read (%s) and counts as empty", self.path, error)
                self._complained = True
            return {}
        self._complained = False
        self._seen = (state, facts)
        return facts
