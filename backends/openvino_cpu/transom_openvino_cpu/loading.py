"""Load: open an artifact and create its kind of session."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from transom.authoring.opening import context_of, paths_of, reading_artifact, threads_of
from transom.contract import Artifact, Device, Limits, Options, Session
from transom.signature import Decoder
from transom_openvino_cpu import names
from transom_openvino_cpu.plan import EnginePlan

if TYPE_CHECKING:
    from transom.sessions.paged import PagedEngine
    from transom_openvino_cpu.engine import OpenVinoEngine
    from transom_openvino_cpu.native.engine import NativeEngine

Array = np.ndarray[Any, np.dtype[Any]]

CACHE_SHARE = 0.5
"""Share of the free memory that the page pool may grow to. Reserved pages that are unused cost nothing."""
MOST_CONTEXTS = 64
"""Maximum size of the pool in full contexts; at least one page for each sequence of the largest step."""


def load_artifact(artifact: Artifact, device: Device, options: Options) -> Session:
    """A session over the artifact.

    Raises:
        EngineError: the files are damaged, or OpenVINO cannot open them.
    """
    files = paths_of(artifact)
    with reading_artifact():
        plan = EnginePlan.from_json(files[names.PLAN_FILE].read_text())
    if plan.native and plan.decoder is not None:
        from transom_openvino_cpu.sparse_session import NativeSession

        native = _native(plan, plan.decoder, files, threads_of(options, device))
        context = context_of(options, plan.decoder.context)
        return NativeSession(native, plan.decoder, context=context, pages=_pool_pages(native, device, context))
    from transom_openvino_cpu.engine import OpenVinoEngine

    engine = OpenVinoEngine(plan, files, threads_of(options, device))
    if not plan.paged or plan.decoder is None:
        return _plain(engine, plan, options)
    from transom.sessions.paged import PagedSession
    from transom_openvino_cpu.paging import OpenVinoPages

    paged, context = OpenVinoPages(engine, plan), context_of(options, plan.decoder.context)
    return PagedSession(paged, plan.decoder, context=context, pages=_pool_pages(paged, device, context))


def _native(plan: EnginePlan, decoder: Decoder, files: Mapping[str, Path], threads: int) -> NativeEngine:
    """The engine of a native artifact.

    Raises:
        EngineError: the program is damaged, or computes another model than the plan describes.
    """
    from transom_openvino_cpu.native.engine import NativeEngine
    from transom_openvino_cpu.native.program import NativeProgram

    with reading_artifact():
        program = NativeProgram.from_json(files[names.PROGRAM_FILE].read_text())
        weights = files[names.WEIGHTS_FILE]
        program.check(decoder)
    return NativeEngine(program, weights, plan.native, threads)


def _pool_pages(engine: PagedEngine, device: Device, context: int) -> int:
    """Pages for many contexts, as memory allows, but at least for one, which the host's memory plan includes."""
    from transom.sessions.paged import MAX_SEQUENCES

    one = -(-context // engine.page_tokens)
    free = device.free_bytes if device.free_bytes is not None else device.memory_bytes
    most = max(MOST_CONTEXTS * one, MAX_SEQUENCES)
    return max(one, min(int(free * CACHE_SHARE) // engine.page_bytes(), most))


def _plain(engine: OpenVinoEngine, plan: EnginePlan, options: Options) -> Session:
    """A session that runs the graph as a whole; `PackedSession` keeps the cache if it has one."""
    from transom.sessions import PackedSession
    from transom_openvino_cpu.integer_limits import check_inputs, check_outputs

    known = set(plan.inputs)

    def run(inputs: Mapping[str, Any]) -> dict[str, Array]:
        if missing := known - set(inputs):
            raise ValueError(f"missing inputs: {', '.join(sorted(missing))}")
        if unknown := set(inputs) - known:
            raise ValueError(f"unknown inputs: {', '.join(sorted(unknown))}")
        arrays = {name: np.require(array, None, ["C", "W"]) for name, array in inputs.items()}
        if plan.limit:
            check_inputs(arrays, plan.limit, plan.summed)
        results = engine.run(arrays, plan.outputs, keep=False)
        check_outputs(results, plan.cut)
        return results

    context = context_of(options, plan.decoder.context) if plan.decoder else 0
    limits = Limits(max_sequences=64, max_tokens=1024, context=context, page_tokens=0)
    return PackedSession(run, plan.decoder, limits, engine.close)
