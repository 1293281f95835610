"""The jobs that the host gives to a child process, in JSON types, and the cache keys of their results.

On the warm path: imports nothing heavy.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transom.artifacts import artifact_key
from transom.contract import Device
from transom.hardware.probe_file import from_json, to_json
from transom.sparsity import DENSE

if TYPE_CHECKING:
    from transom.preparation.compiled import Checked

ENTRY = "transom.preparation.entry:run"
"""The function that every child process calls."""
_PIPELINE = "transom.preparation.pipeline"
READ, PREPARE, RECHECK, REFERENCE, FIDELITY, MEASURE = (
    f"{_PIPELINE}:{function}" for function in ("read", "prepare", "recheck", "reference_outputs", "fidelity", "measure")
)
"""The jobs of a load and an export."""


@functools.cache
def version() -> str:
    """Version of Transom, which is part of every key."""
    import importlib.metadata

    return importlib.metadata.version("transom")


@dataclass(frozen=True)
class Job:
    """One model for one backend on one device."""

    model: str
    """Path of the source, or the name of a model in memory."""
    content: str
    """Key of the source's content, as in `cached_source.find`."""
    graph: str
    """Key under which the cache holds the neutral graph of a model in memory; empty for a model on disk."""
    backend: str
    backend_version: str
    """Version of the distribution that provides the backend."""
    band: str
    """Band of the backend's offer. Memory for `fallback` is planned with everything in float32."""
    device: Device
    options: Mapping[str, Any]
    """The user's `precision`, `context` (None: the model's own), `threads` (None: all) and `max_kl`."""
    cache: str
    cache_limit: int | None
    runtime_identity: str
    """Hardware, driver and versions for which a verdict holds, see `Machine.runtime_identity`."""
    verify: bool
    """Whether to compare with the reference. If not, the artifact is only run."""
    sparsity: str = DENSE
    """The policy in canonical form, with the heads of a file where there is one, without those that Transom ships."""
    texts: tuple[str, ...] = ()
    """The user's calibration texts; empty for the default passages."""
    runs: bool = True
    """Whether the device is in this machine. If not, the artifact is compiled here and never opened."""

    @property
    def source_context(self) -> int | None:
        """The context that the source is opened for; None for a model in memory, which is open already."""
        context: int | None = None if self.graph else self.options["context"]
        return context

    @property
    def artifact_key(self) -> str:
        """Key of the artifact without the source, which `CachedSource.artifact_key` adds.

        `context` and `threads` are left out, because they may change between compiling and loading.
        """
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
                **self._bound,
            }
        )

    @property
    def failure_key(self) -> str:
        """Key under which a failure of this job is remembered."""
        precision, context = self.options["precision"], self.source_context
        of = [self.content, self.runtime_identity, precision, context, self.sparsity, version(), self.texts]
        return artifact_key({"of": of, **self._bound})

    @property
    def _bound(self) -> dict[str, Any]:
        """The part of keys that states `max_kl`: empty without one."""
        bound = self.options.get("max_kl")
        return {} if bound is None else {"max_kl": float(bound)}

    def accepts(self, verdict: Checked | None) -> bool:
        """Whether the host may open the artifact in its own process after this verdict of the self-check.

        An artifact that is never opened here needs no verdict.
        """
        return not self.runs or (verdict is not None and not (self.verify and verdict.get("ran_only")))

    def to_payload(self) -> dict[str, Any]:
        return {**vars(self), "device": to_json([self.device]), "options": dict(self.options)}

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> Job:
        device, texts = from_json(payload["device"])[0], tuple(payload["texts"])
        return cls(**{**payload, "device": device, "texts": texts})
