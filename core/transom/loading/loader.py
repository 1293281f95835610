"""Loads a model, from a path or an object in memory, onto the best device.

A warm load reads only the artifact: probe the devices, choose one, check the manifest, import the engine. On a cold
load a child process reads the source, compiles and checks. Imports nothing that a warm load does not need.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.loading.attempts import first_that_works
from transom.loading.cached_models import CachedModels
from transom.loading.child_jobs import ChildJobs
from transom.loading.identity import identify
from transom.loading.machine import choose, limit_threads, survey
from transom.loading.opening import open_model
from transom.loading.options import auto_policy

if TYPE_CHECKING:
    from transom.generation.model import Model
    from transom.loading.load_state import LoadState


def load_model(
    model: Any, state: LoadState, *, device: str = "auto", backend: str = "auto", probe_file: str | Path | None = None
) -> Model:
    """Load a model that is not a bundle; arguments and errors are those of `transom.load`."""
    deterministic = state.options.deterministic
    with state.stages.time("probe"):
        machine = survey(probe_file, target=device)
        choice = choose(machine, device=device, backend=backend, deterministic=deterministic)
    limit_threads(state, machine)
    with state.stages.time("read"):
        jobs = ChildJobs(state, identify(model, state, machine.plugins))
    models = CachedModels(jobs)
    if choice.kinds_to_measure and auto_policy() == "measure":
        from transom.loading.speeds import measured_speeds

        speeds = measured_speeds(models, machine, choice)
        choice = choose(machine, device=device, backend=backend, measured=speeds, deterministic=deterministic)
    return first_that_works(jobs, machine, choice, lambda attempt: open_model(models, attempt))
