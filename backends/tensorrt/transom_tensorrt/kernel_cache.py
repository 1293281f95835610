"""TensorRT-RTX compiles kernels for the card when it first needs them; this module keeps them in the scratch folder.

TensorRT itself checks whether a cache fits, and silently ignores one that does not. The file's name contains the kind
of card, the driver and the version of TensorRT, so that no version overwrites the cache of another. Cards of one kind
share a file; cards of another kind, which may run the same engine, have their own.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

from transom.artifacts.files import replace_atomically
from transom.contract import Device

_log = logging.getLogger("transom.tensorrt")


class KernelCache:
    """A file of compiled kernels, and the `IRuntimeCache` of TensorRT that it is loaded into.

    Args:
        scratch: a persistent folder.
        version: version of TensorRT.
    """

    def __init__(self, scratch: Path, version: str, device: Device) -> None:
        card = _digest(device.name, device.arch)
        software = _digest(version, *(f"{k} {v}" for k, v in sorted(device.drivers.items())))
        self.path = scratch / f"kernels-{card}-{software}.cache"
        self._outdated = f"kernels-{card}-*.cache"
        self._cache: Any = None
        self._known = b""

    def attach(self, config: Any) -> None:
        """Give the cached kernels to an `IRuntimeConfig`, and collect those that are compiled for it."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            self._read()
        config.set_runtime_cache(self._cache)

    def _read(self) -> None:
        try:
            data = self.path.read_bytes()
        except OSError:  # no cache yet: kernels are compiled
            return
        if self._cache.deserialize(data):
            self._known = data

    def save(self) -> None:
        """Write the file if there are new kernels. If that fails, the next load has to compile them again."""
        if self._cache is None:
            return
        made = self._cache.serialize()
        data = b"" if made is None else bytes(memoryview(made))
        if not data or data == self._known:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_atomically(self.path, data)
            for other in self.path.parent.glob(self._outdated):
                if other != self.path:
                    other.unlink(missing_ok=True)
        except OSError as e:
            _log.warning("TensorRT's compiled kernels are not cached: %s cannot be written: %s", self.path, e)
            return
        self._known = data

    def close(self) -> None:
        """Release TensorRT's cache; after this, nothing is saved."""
        self._cache = None


def _digest(*parts: str) -> str:
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()
