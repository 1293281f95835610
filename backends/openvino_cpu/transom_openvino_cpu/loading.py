"""Load: open an artifact's stages and make the session that fits them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from transom.contract import Artifact, Device, Limits, Options, Session
from transom.errors import EngineError
from transom_openvino_cpu import names
from transom_openvino_cpu.engine import Engine
from transom_openvino_cpu.plan import Plan

Array = np.ndarray[Any, np.dtype[Any]]

CACHE_SHARE = 0.5
"""Share of the free memory that the page pool may grow to. It is reserved, not taken: unused pages cost nothing."""
MOST_CONTEXTS = 64
"""Full contexts that the pool holds at most."""


def load_artifact(artifact: Artifact, device: Device, options: Options) -> Session:
    """A session over the artifact.

    Raises:
        EngineError: the files are not what this backend wrote, or OpenVINO cannot open them.
    """
    files = {name: path for name, path in artifact.files.items() if isinstance(path, Path)}
    try:
        plan = Plan.from_json(files[names.PLAN_FILE].read_text())
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise EngineError(f"this compiled model is damaged: {e}", "Remove it with: transom cache clear") from e
    engine = Engine(plan, files, _threads(device, options))
    if not plan.paged:
        return _plain(engine, plan, options)
    from transom_openvino_cpu.session import PagedSession

    assert plan.decoder is not None
    context = min(int(str(options.get("context") or plan.decoder.context)), plan.decoder.context)
    page_bytes = plan.decoder.cache_bytes(names.PAGE_TOKENS, engine.cache_element_bytes())
    return PagedSession(engine, plan, context=context, pages=_pool_pages(device, context, page_bytes))


def _threads(device: Device, options: Options) -> int:
    asked = options.get("threads")
    return int(str(asked)) if asked else device.cores


def _pool_pages(device: Device, context: int, page_bytes: int) -> int:
    """Pages for many contexts, as memory allows, and for one in any case: the host has planned for that."""
    one = -(-context // names.PAGE_TOKENS)
    free = device.free_bytes if device.free_bytes is not None else device.memory_bytes
    return max(one, min(int(free * CACHE_SHARE) // page_bytes, MOST_CONTEXTS * one))


def _plain(engine: Engine, plan: Plan, options: Options) -> Session:
    """A graph that is run as it is: none of ours keeps its cache, the host's helper does where there is one."""
    from transom.sessions import PackedSession

    known = set(plan.inputs)

    def run(inputs: Mapping[str, Any]) -> dict[str, Array]:
        if missing := known - set(inputs):
            raise ValueError(f"missing inputs: {', '.join(sorted(missing))}")
        if unknown := set(inputs) - known:
            raise ValueError(f"unknown inputs: {', '.join(sorted(unknown))}")
        arrays = {name: np.asarray(array, order="C") for name, array in inputs.items()}
        return engine.run(arrays, plan.outputs, keep=False)

    context = plan.decoder.context if plan.decoder else 0
    if plan.decoder and options.get("context"):
        context = min(context, int(str(options["context"])))
    limits = Limits(max_sequences=64, max_tokens=1024, context=context, page_tokens=0)
    return PackedSession(run, plan.decoder, limits, engine.close)
