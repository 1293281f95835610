"""The stages of a job in a child process: read the source, lower, compile, compute the reference outputs, check.

A stage is skipped where the cache has its result. Not imported on a warm load.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from transom.artifacts import ArtifactBuild, Cache, Origin, StoredArtifact
from transom.contract import Artifact, Progress, Session
from transom.errors import SelectionError, TransomError, UnsupportedError
from transom.graph import Graph
from transom.graph.sparse import with_sparsity
from transom.plugins import LoadedBackend, Plugins, load_plugins
from transom.preparation import cached_source, memory, reference_outputs, selfcheck
from transom.preparation.cached_source import CachedSource
from transom.preparation.calibration_texts import Pieces, pieces
from transom.preparation.compiled import Checked, CompiledModel, allowed
from transom.preparation.heads import with_shipped_heads
from transom.preparation.jobs import Job
from transom.preparation.lowering import Lowered, lower
from transom.preparation.plugin_calls import guarded, open_session, temporary_files_in
from transom.preparation.plugin_operators import explaining_rejected, register_operators
from transom.preparation.reference_process import wait_for
from transom.sources import SourceModel, resolve
from transom.sources.finite import require_finite_graph
from transom.sparsity import Sparsity


class Preparation:
    """One job: its stages, and the objects that they pass on."""

    def __init__(self, payload: Mapping[str, Any], progress: Progress, reference: Future[Any] | None = None) -> None:
        self.job, self.progress, self._reference = Job.from_payload(payload), progress, reference
        self.cache = Cache(Path(self.job.cache), limit=self.job.cache_limit)
        self.seconds: dict[str, float] = {}
        self._plugins: Plugins | None = None
        self._graph: Graph | None = None
        self._source: CachedSource | None = None
        self._opened: SourceModel | None = None
        self._key = ""
        """Key of the opened source in the cache."""

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    @property
    def plugins(self) -> Plugins:
        """The plugins, with their operators registered, which has to happen before a graph that uses them is read."""
        if self._plugins is None:
            self._plugins = load_plugins()
            register_operators(self._plugins)
        return self._plugins

    @property
    def plugin(self) -> LoadedBackend:
        if self.job.backend not in self.plugins.backends:
            raise SelectionError(
                f"The backend {self.job.backend} is not installed for child processes",
                "Install it as a package, so that every process of this Python finds it",
                [str(f) for f in self.plugins.failures],
            )
        return self.plugins.backends[self.job.backend]

    # the source -------------------------------------------------------------------------------------------------------
    def source(self) -> CachedSource:
        """The cached source, read now if the cache does not have it."""
        if self._find() is None:
            if self._opened is None:
                self._read()
            assert self._opened is not None
            self._source = cached_source.keep(self.cache, self._key, self._opened)
        assert self._source is not None
        return self._source

    def use_source(self, source: CachedSource) -> None:
        """Use a source that does not come from the cache."""
        self._source = source

    def _find(self) -> CachedSource | None:
        if self._source is None:
            self._source = cached_source.find(self.cache, self.job.content, self.job.source_context)
        return self._source

    def graph(self) -> Graph:
        """The neutral graph, needed to compile and to compute the reference outputs."""
        if self._graph is None:
            self._read()
            assert self._graph is not None
        return self._graph

    def _read(self) -> None:
        self.plugin  # noqa: B018  fails for a missing backend before anything is read
        with self._timed("read"):
            self.progress("read", None)
            if self.job.graph:
                self._graph = cached_source.open_graph(self.cache, self.job.graph)
                return
            content, context = self.job.content, self.job.source_context
            opened = self._open(None)
            if cached_source.variant(content, context, opened.graph.decoder) != content:
                if cached_source.find(self.cache, content, None) is None:
                    cached_source.keep(self.cache, content, opened)  # the host reads the decoder's context from it
                key = cached_source.variant(content, context, opened.graph.decoder)
                opened = self._open(context)
                assert opened.graph.decoder is not None
                memory.require_context(opened.graph.decoder, context)
                content = key
            if opened.unchecked:
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
        return reference_outputs.check_prompt(source.decoder, source.tokenizer())

    # the artifact -----------------------------------------------------------------------------------------------------
    def options(self) -> dict[str, Any]:
        """The user's options with the planned context, without calibration texts. Raises as `memory.plan`."""
        options = {**self.job.options, "calibration": ()}
        plan = memory.plan_for(self.source().decoder, self.job.device, options, self.job.band)
        return options if plan is None else {**options, "context": plan.context}

    def texts(self, context: int) -> Pieces:
        """The calibration texts for the backend; empty for a graph that is not a decoder."""
        decoder = self.source().decoder
        if decoder is None:
            return ()
        return pieces(self.source().tokenizer(), decoder.vocabulary, context, self.job.texts)

    def policy(self) -> Sparsity:
        """The sparsity policy, with the heads that Transom ships for this model if the policy has none."""
        policy, source = Sparsity.from_string(self.job.sparsity), self.source()
        if policy.dense or source.decoder is None:
            return policy
        return with_shipped_heads(policy, source.decoder, source.name)[0]

    def verified_artifact(self, *, again: bool = False) -> StoredArtifact:
        """The artifact: compiled unless the cache has it, checked unless it has passed for this runtime identity.

        Only one process at a time does this.

        Args:
            again: whether to check it even if it has passed before.
        """
        options, key = self.options(), self.source().artifact_key(self.job)
        with self.cache.building(key, self.progress) as slot:
            stored = slot.found or self._compile(slot, options)
            if again:
                stored.record_verdict(self.job.runtime_identity, None)
            if not self.job.runs:
                self.reference_outputs()  # the bundle contains them, and the graph is in memory now
            elif not self.job.accepts(stored.verdict(self.job.runtime_identity, Checked)):
                wanted = self.reference_outputs() if self.job.verify else {}
                stored.record_verdict(self.job.runtime_identity, self.check(stored, wanted))
        return stored

    def _compile(self, slot: ArtifactBuild, options: Mapping[str, Any]) -> StoredArtifact:
        dense = self.graph()
        graph = with_sparsity(dense, self.policy())
        with self._timed("compile"):
            options = {**options, "calibration": self.texts(options["context"])}
            lowered = lower(graph, self.plugin.backend, self.job.device, options)
            self.progress("compile", None)
            made = self._compiled(lowered, options, slot)
        with self._timed("store"):
            origin = Origin.on(
                self.job.device,
                source=self.job.model,
                backend=self.job.backend,
                backend_version=self.job.backend_version,
                options={k: v for k, v in self.job.options.items() if v is not None},
                ingredients={
                    "exact": lowered.exact,
                    "divergence": lowered.divergence,
                    "decomposed": [*graph.notes[len(dense.notes) :], *lowered.notes()],
                    "sparsity": self.job.sparsity,
                },
            )
            return slot.store(made, origin, self.progress)

    def _compiled(self, lowered: Lowered, options: Mapping[str, Any], slot: ArtifactBuild) -> Artifact:
        """Compile with the backend; on another disk if the cache's is full.

        The backend's temporary files are in the cache's slot. Its artifact can therefore be moved into the cache, not
        copied, and files that it leaves behind are removed with the slot.
        """
        backend = self.plugin.backend

        def compile_in(folder: Path) -> Artifact:
            with temporary_files_in(folder):
                return backend.compile(lowered.graph, self.job.device, options, self.progress)

        try:
            return guarded(backend.name, "compiling this model", lambda: compile_in(slot.work))
        except TransomError as error:
            full = error.__cause__
            if not _is_full(full):
                raise
        outside = slot.outside(full)
        try:
            return guarded(backend.name, "compiling this model", lambda: compile_in(outside))
        except TransomError as error:
            if _is_full(error.__cause__):
                raise slot.no_room(full, error.__cause__) from error
            raise

    def load(self, stored: CompiledModel) -> Session:
        return open_session(self.plugin.backend, stored, self.job.device, self.options())

    # the check --------------------------------------------------------------------------------------------------------
    def reference_outputs(self) -> dict[str, selfcheck.Array]:
        """The reference outputs: `ids` and `logits` for the check prompt.

        For a graph that is not a decoder, its outputs by name; empty where they cannot be computed.
        """
        if self._reference is not None:
            with self._timed("reference"):
                wait_for(self._reference, self.progress)
        source = self._find()
        if source is not None and (known := reference_outputs.recall(self.cache, source)) is not None:
            return known
        # If the other process failed, this one fails in the same way and reports why.
        with self._timed("reference"):
            self.progress("reference", None)
            outputs = self._decoder_outputs() if self.graph().decoder is not None else self._plain_outputs()
            reference_outputs.keep(self.cache, self.source(), outputs)
        return outputs

    def _decoder_outputs(self) -> dict[str, selfcheck.Array]:
        decoder = self.graph().decoder
        assert decoder is not None
        # Not `self.source()`, which would write it to the cache, as the other process does already.
        tokenizer = self.source().tokenizer() if self._opened is None else self._opened.tokenizer
        ids = reference_outputs.check_prompt(decoder, tokenizer)
        return {
            "ids": np.asarray(ids),
            "logits": reference_outputs.reference_logits(self.graph(), ids, self._reference_share),
        }

    def _plain_outputs(self) -> dict[str, selfcheck.Array]:
        from transom.reference.executor import Executor

        try:
            inputs = reference_outputs.plain_inputs(self.source().inputs)
            return Executor(self.graph()).run(inputs, progress=self._reference_share)
        except (ValueError, TypeError, UnsupportedError):
            return {}  # a graph may reject inputs that are generated from shapes alone

    def _reference_share(self, share: float) -> None:
        self.progress("reference", share)

    def check(self, stored: CompiledModel, wanted: Mapping[str, selfcheck.Array]) -> Checked:
        """Run the artifact and compare it with the reference outputs. Returns the verdict.

        Raises:
            SelfCheckFailed: they differ by more than the limits.
        """
        with self._timed("check"):
            self.progress("check", None)
            session = self.load(stored)
            try:
                if not self.job.verify:
                    if self.source().decoder is not None:
                        selfcheck.session_logits(session, self.prompt(), self.job.backend)
                    return {"checked": False, "reason": "switched off", "ran_only": True}
                source, limits = self.source(), allowed(stored)
                return selfcheck.verdict(session, wanted, source, backend=self.job.backend, allowed=limits)
            finally:
                session.close()


def _is_full(error: BaseException | None) -> TypeGuard[OSError]:
    """Whether the disk or the user's quota is full. `ndarray.tofile` reports that without an error number."""
    if not isinstance(error, OSError):
        return False
    full = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
    return error.errno in full or (error.errno is None and str(error).endswith(" written"))
