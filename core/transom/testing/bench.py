"""The setup in which a backend is checked: its device, its lowered and compiled models, and the reference logits."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from transom.contract import Artifact, Backend, Claim, Device, Offer, Refusal, Session
from transom.errors import EngineError, UnsupportedError
from transom.graph import Graph
from transom.preparation.lowering import Lowered, claims_of, lower
from transom.preparation.plugin_calls import temporary_files_in
from transom.reference.executor import Executor
from transom.sessions.inputs import decoder_inputs, empty_cache
from transom.testing.compare import Tolerance, tolerance
from transom.testing.models import VARIANTS, tiny_decoder
from transom.testing.result import Failed, Refused

Array = np.ndarray[Any, np.dtype[Any]]

UNASKED: Mapping[str, object] = {
    "precision": "auto", "context": None, "threads": None, "max_kl": None, "calibration": (),
}  # fmt: skip
"""The options of a load without user options. The host always passes these keys."""


class ReferenceOracle:
    """Reference logits of a decoder graph for whole token sequences, computed without a cache that could be wrong."""

    def __init__(self, graph: Graph) -> None:
        decoder = graph.decoder
        if decoder is None:
            raise ValueError("the graph is not a decoder")
        self.decoder = decoder
        self._executor = Executor(graph, keep_weights=True)
        self._known: dict[tuple[int, ...], Array] = {}

    def logits(self, tokens: Sequence[int]) -> Array:
        """float32 [len(tokens), vocabulary]."""
        key = tuple(int(t) for t in tokens)
        if key not in self._known:
            inputs = decoder_inputs([key], range(len(key)), empty_cache(self.decoder))
            self._known[key] = self._executor.run(inputs)["logits"]
        return self._known[key]


@dataclass(frozen=True)
class TinyModel:
    """A tiny decoder, compiled, with its reference logits."""

    name: str
    graph: Graph
    lowered: Lowered
    artifact: Artifact
    oracle: ReferenceOracle
    limit: float
    """The largest allowed normalized error of a row of logits."""


class Bench:
    """One backend on one device. Use it in a `with` statement: it owns a temporary folder.

    Args:
        precision: the compute precision behind exact claims on this device; sets the tolerances (`compare.PRECISIONS`).
        options: options for `claim`, `compile` and `load` that replace the defaults.
    """

    def __init__(
        self,
        backend: Backend,
        device: Device,
        *,
        seed: int,
        precision: str = "float32",
        options: Mapping[str, object] | None = None,
    ) -> None:
        self.backend, self.device, self.seed = backend, device, seed
        self.precision, self.options = precision, {**UNASKED, **(options or {})}
        self._temporary = tempfile.TemporaryDirectory(prefix="transom-conformance-", ignore_cleanup_errors=True)
        self.folder = Path(self._temporary.name)
        self._models: dict[str, TinyModel | Exception] = {}
        self._stored = 0

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *exception: object) -> None:
        self._temporary.cleanup()

    def rng(self, name: str) -> np.random.Generator:
        """A generator that depends on the seed and the name alone, not on what ran before."""
        return np.random.default_rng([self.seed, zlib.crc32(name.encode())])

    def tolerance(self, exact: bool) -> Tolerance:
        return tolerance(self.precision, exact)

    # from graph to session --------------------------------------------------------------------------------------------
    def offer(self) -> Offer:
        """The backend's offer for the device. Raises Refused with the backend's own reason."""
        for answer in self.backend.probe([self.device]):
            if answer.device_id == self.device.id:
                if isinstance(answer, Refusal):
                    raise Refused(f"the backend refuses {self.device.id}: {answer.reason}. {answer.fix}".rstrip())
                return answer
        raise Failed(f"probe gave no answer for {self.device.id}")

    def lower(self, graph: Graph) -> Lowered:
        """Claim and decompose. Raises Refused with node, operator and reason; Failed for a broken answer."""
        try:
            return lower(graph, self.backend, self.device, self.options)
        except UnsupportedError as e:
            raise Refused("; ".join([e.cause, *e.details])) from e
        except EngineError as e:
            raise Failed(str(e)) from e

    def claim(self, graph: Graph) -> tuple[Claim, ...]:
        """One claim for each node, in order. Raises Failed for a broken answer."""
        try:
            return claims_of(graph, self.backend, self.device, self.options)
        except EngineError as e:
            raise Failed(str(e)) from e

    def compile(self, graph: Graph) -> Artifact:
        """Compile and store the artifact as the host does: every file is a path below one folder."""
        with temporary_files_in(self.folder / "temporary") as folder:
            stored = self.store(self.backend.compile(graph, self.device, self.options, lambda stage, share: None))
        shutil.rmtree(folder, ignore_errors=True)
        return stored

    def store(self, artifact: Artifact) -> Artifact:
        self._stored += 1
        folder = self.folder / f"artifact-{self._stored}"
        files: dict[str, bytes | Path] = {}
        for name, content in artifact.files.items():
            path = (folder / name).resolve()
            if not path.is_relative_to(folder.resolve()):
                raise Failed(f"the artifact's file name {name!r} points outside its folder")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.read_bytes() if isinstance(content, Path) else content)
            files[name] = path
        return Artifact(files, dict(artifact.requires), tuple(artifact.notes))

    def scratch(self) -> Path:
        path = self.folder / "scratch"
        path.mkdir(exist_ok=True)
        return path

    @contextlib.contextmanager
    def session(self, artifact: Artifact, **others: object) -> Iterator[Session]:
        """The loaded artifact; `others` replace options.

        Raises Refused if the backend only compiles for the device.
        """
        if not self.offer().runs_here:
            raise Refused(f"{self.backend.name} only compiles for {self.device.id} and cannot run here")
        session = self.backend.load(artifact, self.device, {**self.options, **others}, self.scratch())
        try:
            yield session
        finally:
            session.close()

    # models -----------------------------------------------------------------------------------------------------------
    def graph(self, variant: str) -> Graph:
        return tiny_decoder(self.rng(f"model {variant}"), **VARIANTS[variant])

    def model(self, variant: str) -> TinyModel:
        """The variant, lowered and compiled once. An error of the first call is raised again at each call."""
        if variant not in self._models:
            try:
                self._models[variant] = self._build(variant)
            except Exception as e:  # noqa: BLE001  kept, and raised below at this and every later call
                self._models[variant] = e
        found = self._models[variant]
        if isinstance(found, Exception):
            raise found
        return found

    def _build(self, variant: str) -> TinyModel:
        self.offer()
        graph = self.graph(variant)
        lowered = self.lower(graph)
        limit = self.tolerance(lowered.exact).logits
        return TinyModel(variant, graph, lowered, self.compile(lowered.graph), ReferenceOracle(graph), limit)
