"""Making an artifact and believing it: open the source, lower, compile, check. The jobs of the child process.

An engine that has never run here may abort or execute an instruction this machine lacks, so the host runs these jobs in
a child process (`transom.runtime.trial`). A job takes and returns JSON types; its results reach the host through
the cache. Nothing here is imported on a warm start.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from transom.artifacts import Cache, Origin, StoredArtifact
from transom.contract import Backend, Device, Options, Progress, Session, Work
from transom.hardware.probe_file import from_json, to_json
from transom.errors import EngineError, SelectionError, TransomError, UnsupportedError
from transom.graph import Graph
from transom.plugins import LoadedBackend, load_plugins
from transom.runtime import memory, prepared, selfcheck
from transom.runtime.lowering import lower
from transom.sources import resolve


@dataclass(frozen=True)
class Job:
    """One model for one backend on one device; everything a child process needs to know, as JSON types."""

    model: str
    """Path of the source, or the name of a model that exists in memory only."""
    graph: str
    """Path of the neutral graph of such a model; else empty."""
    source_key: str
    artifact_key: str
    backend: str
    band: str
    """Of the backend's offer; a `fallback` is planned as if it kept everything in float32."""
    device: Device
    options: Mapping[str, Any]
    """Of the user: `precision`, `context` (None: the model's own), `threads`."""
    cache: str
    cache_limit: int | None
    where: str
    """Names machine, driver and SDK for the verdict."""
    verify: bool

    def to_payload(self) -> dict[str, Any]:
        return {**vars(self), "device": to_json([self.device]), "options": dict(self.options)}

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> Job:
        return cls(**{**payload, "device": from_json(payload["device"])[0]})


def prepare(payload: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Bring one artifact to the point where it can be loaded: source read, compiled, checked. Skips what is done.

    Returns the seconds of each stage.
    """
    job = Job.from_payload(payload)
    desk = _Desk(job, progress)
    with desk.believed():
        return desk.seconds


def measure(payload: Mapping[str, Any], progress: Progress) -> float:
    """Prepare, load, and time a short decode: tokens per second, for choosing between kinds of device."""
    job = Job.from_payload(payload)
    desk = _Desk(job, progress)
    with desk.believed() as stored:
        session = desk.load(stored)
        try:
            progress("measure", None)
            return decode_rate(session, desk.prompt())
        finally:
            session.close()


def decode_rate(session: Session, ids: list[int], tokens: int = 24) -> float:
    """Tokens per second of a short greedy decode, the first few steps left out (they warm the engine up)."""
    state = session.new_state()
    try:
        times = []
        (row,) = session.step([Work(state, ids, "last")])
        for _ in range(tokens):
            token = int(np.asarray(row).argmax())
            start = time.perf_counter()
            (row,) = session.step([Work(state, [token], "last")])
            times.append(time.perf_counter() - start)
    finally:
        state.free()
    return 1.0 / max(float(np.median(times[tokens // 4 :])), 1e-9)


class _Desk:
    """The objects that the stages of one job hand to each other."""

    def __init__(self, job: Job, progress: Progress) -> None:
        self.job, self.progress = job, progress
        self.cache = Cache(Path(job.cache), limit=job.cache_limit)
        self.seconds: dict[str, float] = {}
        self._graph: Graph | None = None
        self._prepared: prepared.Prepared | None = None
        self._plugin: LoadedBackend | None = None

    def _timed(self, stage: str, start: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    @property
    def plugin(self) -> LoadedBackend:
        if self._plugin is None:
            plugins = load_plugins()
            if self.job.backend not in plugins.backends:
                raise SelectionError(
                    f"the backend {self.job.backend} is not there in a child process",
                    "Install it as a package, so that every process of this Python finds it",
                    [str(f) for f in plugins.failures],
                )
            plugins.operators()
            self._plugin = plugins.backends[self.job.backend]
        return self._plugin

    @property
    def backend(self) -> Backend:
        return self.plugin.backend

    def graph(self) -> Graph:
        """The neutral graph: needed to compile and to compute the golden logits, not to load."""
        if self._graph is None:
            start = time.perf_counter()
            self.plugin  # noqa: B018  a plugin's operators must be registered before a graph that uses them is read
            self.progress("read", None)
            if self.job.graph:
                self._graph = Graph.open(Path(self.job.graph))
            else:
                opened = resolve(self.job.model).open(
                    self.job.model, context=self.job.options.get("context"), progress=self.progress
                )
                self._graph = opened.graph
                if self._prepared is None:
                    self._prepared = prepared.keep(self.cache, self.job.source_key, opened)
            self._timed("read", start)
        return self._graph

    def read(self) -> prepared.Prepared:
        if self._prepared is None:
            self._prepared = prepared.find(self.cache, self.job.source_key)
        if self._prepared is None:
            self.graph()
        if self._prepared is None:
            raise EngineError("the model was read and is not in the cache", "Check the cache folder")
        return self._prepared

    def prompt(self) -> list[int]:
        """The check prompt. Raises UnsupportedError for a graph that is not a decoder."""
        source = self.read()
        if source.decoder is None:
            raise UnsupportedError("this model is not a decoder, so its decoding cannot be timed")
        return selfcheck.check_prompt(source.decoder, source.tokenizer())

    def believed(self) -> StoredArtifact:
        """The artifact, compiled if it is not there, checked if it was not on this device."""
        stored = self.artifact()
        if self.job.verify and stored.verdict(self.job.where) is None:
            stored.record_verdict(self.job.where, self.check(stored))
        return stored

    def options(self) -> Options:
        """The user's options with the context that was planned; refuses what does not fit."""
        options = dict(self.job.options)
        decoder = self.read().decoder
        if decoder is not None:
            planned = memory.plan(
                decoder,
                self.job.device,
                context=options.get("context"),
                precision=str(options.get("precision", "auto")),
                exact_float32=self.job.band == "fallback",
            )
            options["context"] = planned.context
        return options

    def artifact(self) -> StoredArtifact:
        """The compiled model, from the cache or made now."""
        options = self.options()
        with self.cache.building(self.job.artifact_key, self.progress) as slot:
            if slot.found is not None:
                return slot.found
            graph = self.graph()
            start = time.perf_counter()
            lowered = lower(graph, self.backend, self.job.device, options)
            self.progress("compile", None)
            made = self._call("compiling", lambda: self.backend.compile(
                lowered.graph, self.job.device, options, self.progress))  # fmt: skip
            self._timed("compile", start)
            origin = Origin.on(
                self.job.device,
                source=self.job.model,
                backend=self.job.backend,
                backend_version=self.plugin.version,
                options={k: v for k, v in self.job.options.items() if v is not None},
                ingredients={"exact": lowered.exact, "decomposed": lowered.notes()},
            )
            return slot.store(made, origin, self.progress)

    def load(self, stored: StoredArtifact) -> Session:
        options = self.options()
        return self._call(
            "loading",
            lambda: self.backend.load(stored.artifact, self.job.device, options, stored.scratch),
        )

    def _call(self, doing: str, call: Any) -> Any:
        from transom.contract import Cancelled

        try:
            return call()
        except (TransomError, Cancelled):
            raise
        except Exception as e:  # a backend is somebody else's code: whatever it raises becomes one sentence
            raise EngineError(
                f"{self.job.backend} failed while {doing} this model: {type(e).__name__}: {e}",
                "Choose another backend with backend=…, or report it to the backend's authors",
            ) from e

    def check(self, stored: StoredArtifact) -> dict[str, Any]:
        """Hold the loaded artifact against the reference; returns the agreement, raises where it is too small."""
        decoder = self.read().decoder
        if decoder is None:
            return {"checked": False, "reason": "not a decoder: there is no fixed prompt"}
        start = time.perf_counter()
        ids, golden = self._golden()
        self._timed("golden", start)
        start = time.perf_counter()
        self.progress("check", None)
        session = self.load(stored)
        try:
            agreement = selfcheck.compare(golden, selfcheck.session_logits(session, ids))
        finally:
            session.close()
        exact = bool(stored.origin.ingredients.get("exact", True))
        selfcheck.judge(agreement, exact=exact, backend=self.job.backend)
        self._timed("check", start)
        return {"checked": True, **agreement.to_dict(), "text": str(agreement)}

    def _golden(self) -> tuple[list[int], Any]:
        key = self.read().graph_digest
        if (entry := self.cache.golden.lookup(key)) is not None:
            return selfcheck.unpack(entry.read("golden.npz"))
        ids = self.prompt()
        logits = selfcheck.golden_logits(self.graph(), ids, lambda share: self.progress("reference", share))
        self.cache.golden.write(key, {"golden.npz": selfcheck.pack(ids, logits)})
        return ids, logits
