"""The bench a backend stands on while it is checked: its device, its lowered models, the oracle beside them."""

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

UNASKED: Mapping[str, object] = {"precision": "auto", "context": None, "threads": None, "calibration": ()}
"""The options of a load where the user named none: the host always gives these keys."""


class ReferenceOracle:
    """Logits of a decoder graph for whole token sequences, each computed from nothing: it has no cache to be wrong."""

    def __init__(self, graph: Graph) -> None:
        decoder = graph.decoder
        if decoder is None:
            raise ValueError("the graph is no decoder")
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
    """A tiny decoder, compiled, with its oracle."""

    name: str
    graph: Graph
    lowered: Lowered
    artifact: Artifact
    oracle: ReferenceOracle
    limit: float
    """Allowed normalised error of a row of logits."""


class Bench:
    """One backend on one device. Use it in a `with`: it owns a temporary folder.

    Args:
        precision: the arithmetic behind exact claims on this device; sets the tolerances (`compare.PRECISIONS`).
        options: passed to `claim`, `compile` and `load`, over what a user gives who asks for nothing.
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
        """Random numbers that depend on the seed and the name alone, whatever ran before."""
        return np.random.default_rng([self.seed, zlib.crc32(name.encode())])

    def tolerance(self, exact: bool) -> Tolerance:
        return tolerance(self.precision, exact)

    # the road from graph to session -----------------------------------------------------------------------------------
    def offer(self) -> Offer:
        """The backend's offer for the device. Raises Refused with the backend's own words."""
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
        """Compile and store as the host does: every file a path below one folder."""
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
                raise Failed(f"the artifact's file name {name!r} leads out of its folder")
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
        """The artifact, loaded with other options where some are named.

        Raises Refused where the offer says that nothing runs here.
        """
        if not self.offer().runs_here:
            raise Refused(f"{self.backend.name} compiles for {self.device.id} and runs nothing here")
        session = self.backend.load(artifact, self.device, {**self.options, **others}, self.scratch())
        try:
            yield session
        finally:
            session.close()

    # models -----------------------------------------------------------------------------------------------------------
    def graph(self, variant: str) -> Graph:
        return tiny_decoder(self.rng(f"model {variant}"), **VARIANTS[variant])

    def model(self, variant: str) -> TinyModel:
        """The variant, lowered and compiled once; what stood in the way is raised again at each call."""
        if variant not in self._models:
            try:
                self._models[variant] = self._build(variant)
            except Exception as e:  # noqa: BLE001  kept and raised below, at this call and at every later one
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
