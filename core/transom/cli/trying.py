"""The job that `transom doctor` runs in a child process: a tiny random decoder on one backend and device.

Compiled, loaded, stepped, and held against the reference, as a real model would be. Takes and returns JSON types.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SEED = 20260101
"""The same decoder each time, so that two reports of one machine can be compared."""


def try_backend(payload: Mapping[str, Any], progress: Any) -> dict[str, Any]:
    """Seconds of each stage, and how far the logits agree.

    Args:
        payload: `backend`, `device` (as `probe_file.to_json` writes it), `folder` for files.

    Raises:
        TransomError: what went wrong, as loading a model would say it.
    """
    import numpy as np

    from transom.artifacts import Cache, Origin, artifact_key
    from transom.errors import EngineError, SelectionError, TransomError
    from transom.hardware.probe_file import from_json
    from transom.plugins import load_plugins
    from transom.preparation import selfcheck
    from transom.preparation.lowering import lower
    from transom.preparation.plugin_operators import register_operators
    from transom.testing.models import tiny_decoder

    (device,) = from_json(payload["device"])
    plugins = load_plugins()
    plugin = plugins.backends.get(payload["backend"])
    if plugin is None:
        raise SelectionError(f"the backend {payload['backend']} is not there in a child process")
    register_operators(plugins)
    seconds: dict[str, float] = {}
    stage, started = "building", time.perf_counter()

    def next_stage(name: str) -> None:
        nonlocal stage, started
        now = time.perf_counter()
        seconds[stage] = now - started
        stage, started = name, now

    try:
        graph = tiny_decoder(np.random.default_rng(SEED), weights="int8")
        assert graph.decoder is not None
        ids = selfcheck.check_prompt(graph.decoder, None)
        golden = selfcheck.golden_logits(graph, ids)
        next_stage("compiling")
        options = {"context": graph.decoder.context, "precision": "auto", "threads": None, "calibration": ()}
        lowered = lower(graph, plugin.backend, device, options)
        made = plugin.backend.compile(lowered.graph, device, options, progress)
        key = artifact_key({"doctor": plugin.name, "device": device.id})
        with Cache(Path(payload["folder"]), limit=None).building(key) as slot:
            stored = slot.store(made, Origin.on(device, source="doctor", backend=plugin.name, backend_version="0"))
        next_stage("loading")
        session = plugin.backend.load(stored.artifact, device, options, stored.scratch)
        next_stage("running")
        try:
            logits = selfcheck.session_logits(session, ids, plugin.name)
        finally:
            session.close()
        next_stage("comparing")
        agreement = selfcheck.compare(golden, logits)
        selfcheck.judge(agreement, exact=lowered.exact, backend=plugin.name)
        next_stage("done")
    except TransomError:
        raise
    except Exception as e:  # a backend is somebody else's code: whatever it raises becomes one sentence
        raise EngineError(f"{plugin.name} failed while {stage} a tiny model: {type(e).__name__}: {e}") from e
    return {"seconds": seconds, "agreement": str(agreement), "notes": [str(note) for note in stored.artifact.notes]}
