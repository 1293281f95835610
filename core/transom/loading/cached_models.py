"""Compiled models in the cache: found there, or compiled into it by a child process."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from transom.errors import EngineError, option
from transom.loading.compiled_models import NotReady, Ready
from transom.preparation import cached_source, memory
from transom.preparation.compiled import Checked
from transom.preparation.jobs import PREPARE, READ, RECHECK, REFERENCE
from transom.preparation.plugin_calls import check_artifact

if TYPE_CHECKING:
    from transom.contract import Verdict
    from transom.loading.attempts import Attempt
    from transom.loading.child_jobs import ChildJobs
    from transom.preparation.cached_source import CachedSource
    from transom.preparation.compiled import CompiledModel


class CachedModels:
    """The compiled models of one load, see `CompiledModels`."""

    bundle = ""

    def __init__(self, jobs: ChildJobs) -> None:
        self.jobs, self.state = jobs, jobs.state

    def source(self, attempt: Attempt) -> CachedSource | None:
        """The cached source, read by a child process if necessary; None where the cache cannot keep it."""
        if (found := self._source(attempt)) is not None:
            return found
        with self.state.stages.time("read"):
            self.jobs.run(READ, attempt)
        return self._source(attempt)

    def _source(self, attempt: Attempt) -> CachedSource | None:
        job = self.jobs.job(attempt)
        return cached_source.find(self.state.cache, job.content, job.source_context)

    def find(self, attempt: Attempt, verdict_now: Checked | None = None) -> Ready | NotReady:
        """As in `CompiledModels`.

        Args:
            verdict_now: verdict that a child process has just reported, for a cache that could not keep it.
        """
        job, name = self.jobs.job(attempt), attempt.candidate.backend
        source = self._source(attempt)
        if source is None:
            return NotReady()
        plan = self._plan(source, attempt)
        compiled = self.state.cache.lookup(
            source.artifact_key(job),
            verify="full" if self.state.options.verify == "always" else "auto",
            progress=self.state.progress,
        )
        if compiled is None:
            return NotReady()
        verdict = check_artifact(attempt.plugin.backend, compiled.artifact, attempt.device)
        if verdict.state == "never":
            compiled.release()
            raise EngineError(
                f"The backend {name} cannot open this compiled model on {attempt.device.id}: {verdict.reason}",
                "Choose another device or backend",
            )
        if reason := self._stale(compiled, plan, verdict):
            compiled.discard(reason)
            return NotReady(reason)
        if plan is not None and (bound := _bound_context(compiled, plan)):
            plan = replace(plan, context=bound)
        checked = compiled.verdict(job.runtime_identity, Checked) or verdict_now
        if not job.accepts(checked):
            compiled.release()
            return NotReady("it has not passed the self-check here yet")
        return Ready(source, compiled, checked, plan, verdict.reason if verdict.state == "slower" else "")

    def _stale(self, compiled: CompiledModel, plan: memory.MemoryPlan | None, verdict: Verdict) -> str:
        """Why the model must be compiled again; empty when it need not."""
        if verdict.state == "rebuild":
            return verdict.reason or "the backend wants it rebuilt"
        bound = compiled.artifact.requires.get("context")
        if plan is not None and bound not in (None, str(plan.context)) and not _bound_context(compiled, plan):
            return f"it was compiled for context={bound}, and {plan.context} is wanted"
        made, wanted = compiled.origin.options.get("threads"), self.state.options.for_backend["threads"]
        if "threads" in compiled.artifact.requires and made != wanted:
            return f"it was compiled for threads={made}, and {wanted} is wanted"
        return ""

    def _plan(self, source: CachedSource, attempt: Attempt) -> memory.MemoryPlan | None:
        options, band = self.state.options.for_backend, attempt.candidate.offer.band
        return memory.plan_for(source.decoder, attempt.device, options, band)

    def prepare(self, attempt: Attempt) -> Ready:
        return self._run(PREPARE, attempt)

    def recheck(self, attempt: Attempt, ready: Ready) -> Ready:
        """Check a compiled model from the cache against the reference again."""
        ready.compiled.release()
        return self._run(RECHECK, attempt)

    def _run(self, work: str, attempt: Attempt) -> Ready:
        """Run a child process that compiles and checks, then find its result in the cache.

        If the cache cannot keep the artifact (disk full), a temporary cache of this process replaces it, with a
        warning. The model then runs, and is compiled again next time.
        """
        state = self.state
        for last in (False, True):
            start = time.perf_counter()
            done = self.jobs.run(work, attempt)
            parts = {f"child {stage}": seconds for stage, seconds in done["seconds"].items()}
            parts["child start"] = time.perf_counter() - start - sum(parts.values())
            for stage, seconds in parts.items():
                state.stages.add(stage, seconds)
            found = self.find(attempt, verdict_now=done["verdict"])
            if isinstance(found, Ready):
                state.warnings += done["warnings"]
                return found
            if found.reason and done["kept"]:
                name = attempt.candidate.backend
                raise EngineError(
                    f"The backend {name} has just compiled this model and refuses to open it: {found.reason}",
                    f"Report it to the authors of {name}, or choose another with {option('backend')}",
                )
            if not last:
                state.use_temporary_cache(done["warnings"] or [state.cache.keeps_nothing()])
        raise state.no_room("the compiled model")

    def reference_outputs(self, attempt: Attempt, source: CachedSource) -> Mapping[str, Any]:
        """As in `CompiledModels`, computed by a child process if the cache does not have them.

        Raises:
            CacheError: neither the cache nor a temporary folder can keep them.
        """
        from transom.preparation import reference_outputs

        state = self.state
        for last in (False, True):
            if (known := reference_outputs.recall(state.cache, source)) is not None:
                return known
            if last:
                state.use_temporary_cache([state.cache.keeps_nothing()])
            self.jobs.run(REFERENCE, attempt)
        if (known := reference_outputs.recall(state.cache, source)) is not None:
            return known
        raise state.no_room("the reference outputs")


def _bound_context(compiled: CompiledModel, plan: memory.MemoryPlan) -> int:
    """The context that a model was compiled for, if it can be used instead of the planned one; else 0.

    That is the case where `auto` reduced both to the free memory: slightly more free memory than at compile time is not
    a reason to compile again.
    """
    bound = compiled.artifact.requires.get("context", "")
    reduced = plan.note and compiled.origin.options.get("context") is None
    return int(bound) if reduced and bound.isdigit() and int(bound) <= plan.context else 0
