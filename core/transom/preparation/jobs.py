"""What the host asks of a child process, as JSON types, and the keys both know the results by. On the warm path."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transom.artifacts import artifact_key
from transom.contract import Device
from transom.hardware.probe_file import from_json, to_json
from transom.sparsity import DENSE

ENTRY = "transom.preparation.entry:run"
"""The function that every child process calls."""
_PIPELINE = "transom.preparation.pipeline"
READ, PREPARE, RECHECK, GOLDEN, PROVE, MEASURE = (
    f"{_PIPELINE}:{function}" for function in ("read", "prepare", "recheck", "golden", "prove", "measure")
)
"""The jobs of a load and an export."""


@functools.cache
def version() -> str:
    """Transom's own version: part of every key."""
    import importlib.metadata

    return importlib.metadata.version("transom")


@dataclass(frozen=True)
class Job:
    """One model for one backend on one device."""

    model: str
    """Path of the source; the name of a model that exists in memory only."""
    content: str
    """Key of the source's content; see `cached_source.find`."""
    graph: str
    """Key under which the cache holds the neutral graph of a model that exists in memory only; else empty."""
    backend: str
    backend_version: str
    """Of the distribution that brings it."""
    band: str
    """Of the backend's offer; a `fallback` is planned as if it kept everything in float32."""
    device: Device
    options: Mapping[str, Any]
    """Of the user: `precision`, `context` (None: the model's own), `threads` (None: all)."""
    cache: str
    cache_limit: int | None
    place: str
    """`Machine.place`: what a verdict holds for."""
    verify: bool
    """Compare with the reference; else only see that it runs."""
    sparsity: str = DENSE
    """The policy, in canonical form, with the heads of a file where there is one; what Transom ships is not in it."""
    texts: tuple[str, ...] = ()
    """The user's, to calibrate on; empty for those that come with Python."""
    runs: bool = True
    """False: the device is only compiled for, so what is compiled is never opened here."""

    @property
    def source_context(self) -> int | None:
        """The context that the source is opened for; a model in memory is as it is."""
        context: int | None = None if self.graph else self.options["context"]
        return context

    @property
    def artifact_key(self) -> str:
        """Without the source, which `CachedSource.artifact_key` adds; without `context` and `threads`, which may
        change between compiling and loading; without the texts of a user who gave none."""
        return artifact_key(
            {
                "backend": self.backend,
                "version": self.backend_version,
                "arch": self.device.arch,
                "features": self.device.features,
                "members": len(self.device.members),
                "precision": self.options["precision"],
                "sparsity": self.sparsity,
                "transom": version(),
                **({"calibration": self.texts} if self.texts else {}),
            }
        )

    @property
    def failure_key(self) -> str:
        """Names this attempt, to remember that it failed."""
        precision, context = self.options["precision"], self.source_context
        return artifact_key(
            {"of": [self.content, self.place, precision, context, self.sparsity, version(), self.texts]}
        )

    def accepts(self, verdict: object) -> bool:
        """Whether this verdict of the self-check allows the host to open the artifact in its own process. An artifact
        that is never opened here needs no verdict."""
        return not self.runs or (isinstance(verdict, dict) and not (self.verify and verdict.get("ran_only")))

    def to_payload(self) -> dict[str, Any]:
        return {**vars(self), "device": to_json([self.device]), "options": dict(self.options)}

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> Job:
        device, texts = from_json(payload["device"])[0], tuple(payload["texts"])
        return cls(**{**payload, "device": device, "texts": texts})
