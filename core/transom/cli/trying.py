"""The job that `transom doctor` runs in a child process: a tiny random decoder on one backend and device.

It is prepared as a real model would be: lowered, compiled, loaded, stepped, and compared with the reference. Takes and
returns JSON types.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SEED = 20260101
"""Fixed, so that two reports of one machine can be compared."""


def try_backend(payload: Mapping[str, Any], progress: Any) -> dict[str, Any]:
    """`seconds` of each stage, the `agreement` with the reference, and the `notes` of the artifact.

    Args:
        payload: `backend`, `device` (as `probe_file.to_json` writes it), `folder` for files.

    Raises:
        TransomError: the error that loading a model would report.
    """
    from pathlib import Path

    import numpy as np

    from transom.artifacts import Cache
    from transom.hardware.probe_file import from_json
    from transom.preparation.cached_source import keep, keep_graph
    from transom.preparation.compiled import Checked, verdict_text
    from transom.preparation.jobs import Job
    from transom.preparation.stages import Preparation
    from transom.sources import SourceModel
    from transom.testing.models import tiny_decoder
    from transom.text import GenerationDefaults

    (device,) = from_json(payload["device"])
    name, content = "a tiny model", "doctor"
    graph = tiny_decoder(np.random.default_rng(SEED), weights="int8")
    cache = Cache(Path(payload["folder"]), limit=None)
    held = [
        keep(cache, content, SourceModel(graph, None, None, GenerationDefaults(), name, "made up")),
        keep_graph(cache, f"{content}-graph", graph),
    ]
    job = Job(
        model=name,
        content=content,
        graph=f"{content}-graph",
        backend=payload["backend"],
        backend_version="",
        band="generic",
        device=device,
        options={"context": None, "precision": "auto", "threads": None, "max_kl": None},
        cache=payload["folder"],
        cache_limit=None,
        runtime_identity="here",
        verify=True,
    )
    preparation = Preparation(job.to_payload(), progress)
    with preparation.verified_artifact() as stored:
        verdict = stored.verdict(job.runtime_identity, Checked)
        notes = [str(note) for note in stored.artifact.notes]
    held.clear()
    return {"seconds": preparation.seconds, "agreement": verdict_text(verdict).removeprefix("passed, "), "notes": notes}
