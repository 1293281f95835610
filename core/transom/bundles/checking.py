"""The job of the child process that checks a bundle where it has never run. Imported nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transom.bundles.bundle import open_bundle
from transom.contract import Progress
from transom.preparation.compiled import Checked
from transom.preparation.stages import Preparation


def check(payload: Mapping[str, Any], progress: Progress) -> Checked:
    """Open a bundle and compare it with the reference outputs that it contains. Returns the verdict.

    Args:
        payload: the job, and the name of the `variant`.
    """
    arguments = dict(payload)
    name = arguments.pop("variant")
    preparation = Preparation(arguments, progress)
    job = preparation.job
    whole = open_bundle(Path(job.model), preparation.cache, progress)
    bundle = whole.of(next(v for v in whole.manifest.variants if v.name == name))
    try:
        preparation.use_source(bundle.source)
        return preparation.check(bundle, bundle.reference_outputs() if job.verify else {})
    finally:
        bundle.release()
