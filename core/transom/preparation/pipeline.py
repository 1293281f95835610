"""Making an artifact and believing it: open the source, lower, compile, check. The jobs of the child process.

An engine that has never run here may abort or execute an instruction this machine lacks, so the host runs these jobs in
a child process (`transom.preparation.child`). A job takes and returns JSON types; its results reach the host through
the cache. Nothing here is imported on a warm start.
"""

from __future__ import annotations

import errno
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from transom.artifacts import Cache, Origin, Slot, StoredArtifact
from transom.contract import Artifact, Progress, Session
from transom.errors import SelectionError, TransomError, UnsupportedError
from transom.graph import Graph
from transom.graph.sparse import with_sparsity
from transom.hardware.probe_file import from_json
from transom.plugins import LoadedBackend, Plugins, load_plugins
from transom.preparation import cached_source, memory, selfcheck
from transom.preparation.cached_source import Compiled, Prepared
from transom.preparation.calibration_texts import Pieces, pieces
from transom.preparation.heads import calibrated
from transom.preparation.jobs import Job
from transom.preparation.lowering import lower
from transom.preparation.plugin_calls import guarded
from transom.preparation.plugin_operators import explaining_rejected, register_operators
from transom.preparation.reference_process import wait_for
from transom.sources import SourceModel, resolve
from transom.sources.finite import require_finite_graph
from transom.sparsity import Sparsity

TIMED_TOKENS = 24
"""Of a measured decode."""


def read(payload: Mapping[str, Any], progress: Progress) -> None:
    """Open the source and keep what the host needs of it."""
    Preparation(payload, progress).source()


def prepare(payload: Mapping[str, Any], progress: Progress, reference: Future[Any] | None = None) -> dict[str, Any]:
    """Bring one artifact to the point where it can be loaded: source read, compiled, checked. Skips what is done.

    Args:
        reference: a process that computes the golden logits meanwhile.

    Returns `seconds` of each stage, whether the cache `kept` the artifact, so that the host can find it, and the
    `verdict`, which a full disk may have kept from the cache; its `warnings` tell.
    """
    return _told(Preparation(payload, progress, reference))


def recheck(payload: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """As `prepare`, and what is believed already is checked all the same. Where it fails it is believed no more."""
    return _told(Preparation(payload, progress), again=True)


def _told(one: Preparation, *, again: bool = False) -> dict[str, Any]:
    with one.believed(again=again) as stored:
        return {
            "seconds": one.seconds,
            "kept": not stored.temporary,
            "verdict": stored.verdict(one.job.place),
            "warnings": one.cache.warnings,
        }


def golden(payload: Mapping[str, Any], progress: Progress) -> None:
    """Compute the reference's answers to the check prompt, where the cache has them no more."""
    Preparation(payload, progress).golden()


def prove(payload: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Run what was compiled for another device on one of this machine that can, an emulator say, and compare it with
    the reference: `fidelity` is what `Variant.fidelity` holds, but for `where`; `agreements` are pairs of a mean
    divergence and the least correlation, of all positions and of those that a self-check judges by themselves.

    Args:
        payload: the job with the device that it is compiled for; `on`: the device that is here; `remove`: whether what
            is compiled serves for this alone.

    Raises:
        EngineError: it cannot be opened there, or fails.
    """
    arguments = dict(payload)
    on, remove = from_json(arguments.pop("on"))[0], arguments.pop("remove")
    one = Preparation({**arguments, "runs": False}, progress)  # not refused here: the caller judges
    with one.believed() as stored:
        wanted = one.golden()
        progress("prove", None)
        options = {**one.options(), "threads": None}
        backend = one.plugin.backend
        session = guarded(
            backend.name, "loading this model", lambda: backend.load(stored.artifact, on, options, stored.scratch)
        )
        try:
            got = selfcheck.session_logits(session, wanted["ids"].tolist(), backend.name)
        finally:
            session.close()
        if remove:
            stored.remove()
        golden = wanted["logits"][: len(got)]
        found = guarded(backend.name, "checking logits", lambda: selfcheck.agreements(golden, got))
        whole = found[0]
        return {
            "fidelity": {
                "tokens": len(got), "kl": whole.kl_mean, "top1": whole.top1, "cosine": selfcheck.cosine(golden, got),
            },
            "agreements": [[one.kl_mean, one.correlation_min] for one in found],
        }  # fmt: skip


def measure(payload: Mapping[str, Any], progress: Progress) -> float:
    """Prepare, load, and time a short decode: tokens per second, for choosing between kinds of device."""
    one = Preparation(payload, progress)
    with one.believed() as stored:
        session = one.load(stored)
        try:
            progress("measure", None)
            ids = one.prompt()
            return guarded(one.job.backend, "decoding", lambda: decode_rate(session, ids))
        finally:
            session.close()


def _is_full(error: OSError) -> bool:
    """Whether the disk, or what this user may use of it, is at its end. `ndarray.tofile` gives no number for that."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
    return error.errno in full or (error.errno is None and str(error).endswith(" written"))


def decode_rate(session: Session, ids: list[int]) -> float:
    """Tokens per second of a short greedy decode; the first quarter warms the engine up and does not count."""
    context = session.limits.context
    ids = ids[: max(1, context // 2)]
    state = session.new_state()
    try:
        times = []
        row = selfcheck.feed(session, state, ids)[-1][-1]
        for _ in range(min(TIMED_TOKENS, context - len(ids))):
            token = int(row.argmax())
            start = time.perf_counter()
            row = selfcheck.feed(session, state, [token])[-1][-1]
            times.append(time.perf_counter() - start)
    finally:
        state.free()
    return 1.0 / max(float(np.median(times[len(times) // 4 :])), 1e-9) if times else 0.0


class Preparation:
    """The objects that the stages of one job hand to each other."""

    def __init__(self, payload: Mapping[str, Any], progress: Progress, reference: Future[Any] | None = None) -> None:
        self.job, self.progress, self._reference = Job.from_payload(payload), progress, reference
        self.cache = Cache(Path(self.job.cache), limit=self.job.cache_limit)
        self.seconds: dict[str, float] = {}
        self._plugins: Plugins | None = None
        self._graph: Graph | None = None
        self._source: Prepared | None = None
        self._opened: SourceModel | None = None
        self._key = ""  # of what was opened

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    @property
    def plugins(self) -> Plugins:
        """Their operators registered, as they must be before a graph that uses them is read."""
        if self._plugins is None:
            self._plugins = load_plugins()
            register_operators(self._plugins)
        return self._plugins

    @property
    def plugin(self) -> LoadedBackend:
        if self.job.backend not in self.plugins.backends:
            raise SelectionError(
                f"The backend {self.job.backend} is not there in a child process",
                "Install it as a package, so that every process of this Python finds it",
                [str(f) for f in self.plugins.failures],
            )
        return self.plugins.backends[self.job.backend]

    # the source -------------------------------------------------------------------------------------------------------
    def source(self) -> Prepared:
        """What the cache keeps of the source, read now where it does not."""
        if self._find() is None:
            if self._opened is None:
                self._read()
            assert self._opened is not None
            self._source = cached_source.keep(self.cache, self._key, self._opened)
        assert self._source is not None
        return self._source

    def take(self, source: Prepared) -> None:
        """Work with a source that does not come from the cache."""
        self._source = source

    def _find(self) -> Prepared | None:
        if self._source is None:
            self._source = cached_source.find(self.cache, self.job.content, self.job.source_context)
        return self._source

    def graph(self) -> Graph:
        """The neutral graph: needed to compile and to compute the golden logits, not to load."""
        if self._graph is None:
            self._read()
            assert self._graph is not None
        return self._graph

    def _read(self) -> None:
        self.plugin  # noqa: B018  refuses a backend that is not there before anything is read
        with self._timed("read"):
            self.progress("read", None)
            if self.job.graph:
                self._graph = cached_source.open_graph(self.cache, self.job.graph)
                return
            content, context = self.job.content, self.job.source_context
            opened = self._open(None)
            if cached_source.variant(content, context, opened.graph.decoder) != content:
                if cached_source.find(self.cache, content, None) is None:
                    cached_source.keep(self.cache, content, opened)  # by which the host knows that it is a variant
                key = cached_source.variant(content, context, opened.graph.decoder)
                opened = self._open(context)
                assert opened.graph.decoder is not None
                memory.require_context(opened.graph.decoder, context)
                content = key
            if opened.kind == "onnx":  # other sources look at each weight as it is loaded
                require_finite_graph(opened.graph, self.job.model)
            self._graph, self._opened, self._key = opened.graph, opened, content

    def _open(self, context: int | None) -> SourceModel:
        with explaining_rejected(self.plugins):
            return resolve(self.job.model).open(self.job.model, context=context, progress=self.progress)

    def prompt(self) -> list[int]:
        """The check prompt. Raises UnsupportedError for a graph that is not a decoder."""
        source = self.source()
        if source.decoder is None:
            raise UnsupportedError("This model is not a decoder, so its decoding cannot be timed")
        return selfcheck.check_prompt(source.decoder, source.tokenizer())

    # the artifact -----------------------------------------------------------------------------------------------------
    def options(self) -> dict[str, Any]:
        """The user's options with the context that was planned, and no texts; refuses what does not fit."""
        options = {**self.job.options, "calibration": ()}
        decoder = self.source().decoder
        if decoder is not None:
            options["context"] = memory.plan(
                decoder,
                self.job.device,
                context=options["context"],
                precision=options["precision"],
                exact_float32=self.job.band == "fallback",
            ).context
        return options

    def texts(self, context: int) -> Pieces:
        """What a backend may calibrate on; nothing for a graph that is not a decoder."""
        decoder = self.source().decoder
        if decoder is None:
            return ()
        return pieces(self.source().tokenizer(), decoder.vocabulary, context, self.job.texts)

    def policy(self) -> Sparsity:
        """The sparsity policy, with the heads that Transom ships for this model where it has none of its own."""
        policy, source = Sparsity.from_string(self.job.sparsity), self.source()
        if policy.dense or source.decoder is None:
            return policy
        return calibrated(policy, source.decoder, source.name)[0]

    def believed(self, *, again: bool = False) -> StoredArtifact:
        """The artifact, compiled if it is not there, checked if it was not in this place; by one process at a time.

        Args:
            again: check it whatever was found before.
        """
        options, key = self.options(), self.source().artifact_key(self.job)
        with self.cache.building(key, self.progress) as slot:
            stored = slot.found or self._compile(slot, options)
            if again:
                stored.record_verdict(self.job.place, None)
            if not self.job.runs:
                self.golden()  # whoever exports it writes this down too, and the graph is in memory now
            elif not self.job.believes(stored.verdict(self.job.place)):
                wanted = self.golden() if self.job.verify else {}
                stored.record_verdict(self.job.place, self.check(stored, wanted))
        return stored

    def _compile(self, slot: Slot, options: Mapping[str, Any]) -> StoredArtifact:
        dense = self.graph()
        graph = with_sparsity(dense, self.policy())
        with self._timed("compile"):
            backend, device = self.plugin.backend, self.job.device
            options = {**options, "calibration": self.texts(options["context"])}
            lowered = lower(graph, backend, device, options)
            self.progress("compile", None)

            def compile_in(folder: Path) -> Artifact:
                # What the backend puts into temporary files is then moved into the cache and not copied, and what it
                # leaves behind goes with the slot. The process is this job's own.
                before, tempfile.tempdir = tempfile.tempdir, str(folder)
                try:
                    return backend.compile(lowered.graph, device, options, self.progress)
                finally:
                    tempfile.tempdir = before

            try:
                made = guarded(backend.name, "compiling this model", lambda: compile_in(slot.work))
            except TransomError as error:
                cause = error.__cause__
                if not isinstance(cause, OSError) or not _is_full(cause):
                    raise
                outside = slot.outside(cause)
                try:
                    made = guarded(backend.name, "compiling this model", lambda: compile_in(outside))
                except TransomError as second:
                    if isinstance(second.__cause__, OSError) and _is_full(second.__cause__):
                        raise slot.no_room(cause, second.__cause__) from second
                    raise
        with self._timed("store"):
            origin = Origin.on(
                device,
                source=self.job.model,
                backend=self.job.backend,
                backend_version=self.job.backend_version,
                options={k: v for k, v in self.job.options.items() if v is not None},
                ingredients={
                    "exact": lowered.exact,
                    "decomposed": [*graph.notes[len(dense.notes) :], *lowered.notes()],
                    "sparsity": self.job.sparsity,
                },
            )
            return slot.store(made, origin, self.progress)

    def load(self, stored: Compiled) -> Session:
        backend, device, options = self.plugin.backend, self.job.device, self.options()
        call = lambda: backend.load(stored.artifact, device, options, stored.scratch)  # noqa: E731
        return guarded(backend.name, "loading this model", call)

    # the check --------------------------------------------------------------------------------------------------------
    def golden(self) -> dict[str, selfcheck.Array]:
        """What the reference answers: `ids` and `logits`; of a plain graph its outputs, or nothing where it fails."""
        if self._reference is not None:
            with self._timed("golden"):
                wait_for(self._reference, self.progress)
        source = self._find()
        if source is not None and (known := selfcheck.recall_golden(self.cache, source)) is not None:
            return known
        # Where the process beside this one failed, this one does so again, and says why.
        with self._timed("golden"):
            self.progress("reference", None)

            def report(share: float) -> None:
                self.progress("reference", share)

            decoder = self.graph().decoder
            if decoder is not None:
                # Not by `source`, which would write it down first: beside another process that does so that is wasted.
                tokenizer = self.source().tokenizer() if self._opened is None else self._opened.tokenizer
                ids = selfcheck.check_prompt(decoder, tokenizer)
                answer = {"ids": np.asarray(ids), "logits": selfcheck.golden_logits(self.graph(), ids, report)}
            else:
                from transom.reference.executor import Executor

                try:
                    inputs = selfcheck.plain_inputs(self.source().inputs)
                    answer = Executor(self.graph()).run(inputs, progress=report)
                except (ValueError, TypeError, UnsupportedError):
                    answer = {}  # inputs made up from shapes need not mean anything to a graph
            selfcheck.keep_golden(self.cache, self.source(), answer)
        return answer

    def check(self, stored: Compiled, wanted: Mapping[str, selfcheck.Array]) -> dict[str, Any]:
        """Run the loaded artifact and hold it against the reference's answers; raises where they disagree."""
        with self._timed("check"):
            self.progress("check", None)
            session = self.load(stored)
            try:
                if not self.job.verify:
                    if self.source().decoder is not None:
                        selfcheck.session_logits(session, self.prompt(), self.job.backend)
                    return {"checked": False, "reason": "switched off", "ran_only": True}
                exact = bool(stored.origin.ingredients.get("exact", True))
                return selfcheck.verdict(session, wanted, self.source(), backend=self.job.backend, exact=exact)
            finally:
                session.close()
