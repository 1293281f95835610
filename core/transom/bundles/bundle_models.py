"""Compiled models in a bundle: nothing is compiled; a child process checks a variant that has never run here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transom.errors import EngineError
from transom.loading.compiled_models import NotReady, Ready
from transom.preparation import memory
from transom.preparation.compiled import Checked
from transom.preparation.plugin_calls import check_artifact

if TYPE_CHECKING:
    from transom.bundles.bundle import Bundle
    from transom.loading.attempts import Attempt
    from transom.loading.child_jobs import ChildJobs
    from transom.preparation.cached_source import CachedSource

_CHECK = "transom.bundles.checking:check"
"""The job of the child process."""


class BundleModels:
    """The compiled models of one load, see `CompiledModels`: only the selected variant of a bundle."""

    def __init__(self, jobs: ChildJobs, bundle: Bundle) -> None:
        self.jobs, self.bundle = jobs, str(bundle.folder)
        self._bundle = bundle

    def find(self, attempt: Attempt, verdict_now: Checked | None = None) -> Ready | NotReady:
        """As in `CompiledModels`.

        Args:
            verdict_now: verdict that a child process has just reported, for a cache that could not keep it.
        """
        bundle, job = self._bundle, self.jobs.job(attempt)
        fits = check_artifact(attempt.plugin.backend, bundle.artifact, attempt.device)
        source = bundle.source
        plan = memory.plan_for(
            source.decoder, attempt.device, self.jobs.state.options.for_backend, attempt.candidate.offer.band
        )
        checked = bundle.verdict(job.runtime_identity, Checked) or verdict_now
        if not job.accepts(checked):
            return NotReady("it has not passed the self-check here yet")
        return Ready(source, bundle, checked, plan, fits.reason if fits.state == "slower" else "")

    def prepare(self, attempt: Attempt) -> Ready:
        with self.jobs.state.stages.time("child check"):
            verdict = self.jobs.run(_CHECK, attempt, variant=self._bundle.variant.name)
        self._bundle.record_verdict(attempt.runtime_identity, verdict)
        found = self.find(attempt, verdict)
        if isinstance(found, NotReady):
            raise EngineError(
                f"The bundle {self.bundle} has just been checked and may not be opened: {found.reason}",
                "Load it again, or export the model again",
            )
        return found

    def reference_outputs(self, attempt: Attempt, source: CachedSource) -> Mapping[str, Any]:
        return self._bundle.reference_outputs()
