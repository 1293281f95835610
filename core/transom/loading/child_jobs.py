"""Runs the jobs of one load in child processes, which pass their results through the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transom.preparation import cached_source
from transom.preparation.child import run_in_child
from transom.preparation.jobs import ENTRY, PREPARE, Job

if TYPE_CHECKING:
    from transom.loading.attempts import Attempt
    from transom.loading.identity import ModelIdentity
    from transom.loading.load_state import LoadState


class ChildJobs:
    """The jobs for the model of one load."""

    def __init__(self, state: LoadState, identity: ModelIdentity) -> None:
        self.state, self.identity = state, identity

    def job(self, attempt: Attempt) -> Job:
        state, identity = self.state, self.identity
        return Job(
            model=identity.path,
            content=identity.content,
            graph="" if identity.in_memory is None else f"{identity.content}-graph",
            backend=attempt.candidate.backend,
            backend_version=attempt.plugin.version,
            band=attempt.candidate.offer.band,
            device=attempt.device,
            options=state.options.for_backend,
            cache=str(state.cache.root),
            cache_limit=state.cache.limit,
            runtime_identity=attempt.runtime_identity,
            verify=state.options.verify != "off",
            sparsity=identity.sparsity.to_string(),
            texts=state.options.texts,
            runs=attempt.runs_here,
        )

    def run(self, work: str, attempt: Attempt, **more: Any) -> Any:
        """Run a job, with a cache that can keep its results.

        Args:
            work: the function as `"module:function"`, see `transom.preparation.jobs`.
            more: further arguments of the function, JSON types.

        Raises:
            ChildFailed: the process crashed, hung or was killed.
            TransomError, Cancelled: as the job raised it.
        """
        state = self.state
        if (error := state.cache.unwritable()) is not None:
            state.use_temporary_cache([state.cache.keeps_nothing(error)])
        job = self.job(attempt)
        self._keep_model_in_memory(job)
        payload = {"work": work, **job.to_payload(), **more}
        if work == PREPARE:
            from transom.preparation.reference_process import worth_a_process

            payload["parallel_reference"] = worth_a_process(job, state.cache, attempt.machine.free_bytes)
        try:
            result = run_in_child(ENTRY, payload, progress=state.progress)
            return result.unwrap(f"Preparing the model with {attempt.candidate.backend}")
        except BaseException:
            state.cache.sweep()  # removes incomplete entries of a killed child process
            raise

    def _keep_model_in_memory(self, job: Job) -> None:
        """Put a model in memory into the cache, from which a child process can read it."""
        model, state = self.identity.in_memory, self.state
        if model is None:
            return
        if cached_source.find(state.cache, job.content, job.source_context) is None:
            state.held.append(cached_source.keep(state.cache, job.content, model))
        if state.cache.sources.lookup(job.graph) is None:
            state.held.append(cached_source.keep_graph(state.cache, job.graph, model.graph))
